"""Clusters of several nodes on this machine, each with processes of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "search"))


@pytest.fixture
def cluster() -> Iterator[object]:
    """A head without room for trials, so that it is never in the way; add nodes as needed."""
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
