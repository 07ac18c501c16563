"""Settings for the whole test run."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

# Several tests run at once, each with processes of its own, so none needs more than one thread.
# The variable is read when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from postgres_server import Postgres
from s3_server import S3

pytest_plugins = ["durations"]

SERVERS = {"postgres", "s3"}
"""Fixtures that start a server."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute the tests by file: one process starts with the Ray tests, others with the rest.

    Tests that use Ray mostly wait for processes to start, which leaves a core to the other tests.
    A process that has finished its own files continues with those of the other process.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _assign_work_unit(self, node: Any) -> None:
            if node.gateway.id != "gw0":
                self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
            super()._assign_work_unit(node)

    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start a server; sort Ray's files longest first, the others longest last."""
    from durations import recorded  # once the plugin is loaded

    ray = {item.path for item in items if item.get_closest_marker("cluster")}
    files = recorded()["files"]

    def place(item: pytest.Item) -> tuple[bool, float]:
        seconds = files.get(item.nodeid.partition("::")[0], 0.0)
        return (item.path not in ray, -seconds if item.path in ray else seconds)

    for item in items:
        if SERVERS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)
    items.sort(key=place)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL server."""
    server = Postgres()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def database(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty database; `NIPQ_STORAGE_URL` is set to it."""
    url = postgres.new_database(f"test_{uuid.uuid4().hex[:12]}")
    monkeypatch.setenv("NIPQ_STORAGE_URL", url)
    return url


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A local S3 server with an empty bucket; the environment contains its access keys."""
    server = S3(monkeypatch)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Use one torch thread: more threads neither speed up small tensors nor change results."""
    torch.set_num_threads(1)
