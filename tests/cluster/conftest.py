"""Clusters of several nodes on this machine, each with processes of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "search"))

from sweep_helpers import wait_for, warm_start  # noqa: E402

HEALTH_CHECKS = {"health_check_period_ms": 300, "health_check_failure_threshold": 4}
"""Nodes that were killed are declared dead within two seconds instead of fifteen; a node that is
only slow has ten seconds for each answer, as by default."""


@pytest.fixture(scope="session")
def head() -> Iterator[Any]:
    """The head of a cluster, without resources for trials."""
    from nipq_search.search.backend.tune import quiet_environment

    quiet_environment()
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        _set_environment(patch)
        arguments = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH_CHECKS}
        found = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        yield found
    finally:
        found.shutdown()


def _set_environment(patch: pytest.MonkeyPatch) -> None:
    """Set what the processes of nodes inherit: an open cluster, with a warm start."""
    patch.setenv("RAY_AUTH_MODE", "disabled")
    for name, value in warm_start().items():
        patch.setenv(name, value)


@pytest.fixture
def cluster(head: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The cluster without other nodes than its head; each test adds the nodes it needs."""
    _set_environment(monkeypatch)
    try:
        yield head
    finally:
        for node in list(head.worker_nodes):
            head.remove_node(node)
        # The next test would be offered the CPUs of nodes whose death Ray has not noticed.
        wait_for(lambda: len(_alive(head)) == 1, "killed nodes to be declared dead")


def _alive(head: Any) -> list[dict[str, Any]]:
    """Return the nodes that the cluster regards as alive."""
    return [node for node in head.global_state.node_table() if node["Alive"]]
