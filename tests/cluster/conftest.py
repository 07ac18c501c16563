"""A cluster of several nodes on this machine, each node with its own processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "search"))

from sweep_helpers import wait_for, warm_start  # noqa: E402

HEALTH_CHECKS = {"health_check_period_ms": 300, "health_check_failure_threshold": 4}
"""Declare killed nodes dead within two seconds instead of fifteen. A node that is merely slow
still has ten seconds for each reply, as by default."""


@pytest.fixture(scope="session")
def head() -> Iterator[Any]:
    """The head of a cluster, without resources for trials."""
    from nipq_search.search.backend.tune import set_ray_defaults

    set_ray_defaults()
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
    """Set the environment that the nodes' processes inherit: no token, and a warm start."""
    patch.setenv("RAY_AUTH_MODE", "disabled")
    for name, value in warm_start().items():
        patch.setenv(name, value)


@pytest.fixture
def cluster(head: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The cluster with no nodes other than its head; each test adds the nodes that it needs."""
    _set_environment(monkeypatch)
    try:
        yield head
    finally:
        for node in list(head.worker_nodes):
            head.remove_node(node)
        # Otherwise Ray could offer the next test CPUs of dead nodes that it still considers alive.
        wait_for(lambda: len(_alive(head)) == 1, "killed nodes to be declared dead")


def _alive(head: Any) -> list[dict[str, Any]]:
    """Return the nodes that Ray considers alive."""
    return [node for node in head.global_state.node_table() if node["Alive"]]
