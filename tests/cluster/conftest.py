"""Clusters of several nodes on this machine, each with processes of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "search"))

from sweep_helpers import wait_for  # noqa: E402


@pytest.fixture(scope="session")
def head() -> Iterator[Any]:
    """The head of a cluster, without resources for trials."""
    from nipq_search.search.backend.tune import quiet_environment

    quiet_environment()
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False},
    )
    try:
        yield found
    finally:
        found.shutdown()


@pytest.fixture
def cluster(head: Any) -> Iterator[Any]:
    """The cluster without other nodes than its head; each test adds the nodes it needs."""
    try:
        yield head
    finally:
        for node in list(head.worker_nodes):
            head.remove_node(node)
        # Ray notices a killed node after some seconds; the next test would be offered its CPUs.
        wait_for(lambda: len(_alive(head)) == 1, "killed nodes to be declared dead")


def _alive(head: Any) -> list[dict[str, Any]]:
    """Return the nodes that the cluster regards as alive."""
    return [node for node in head.global_state.node_table() if node["Alive"]]
