"""Settings of the whole test run."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from postgres_server import Postgres
from s3_server import S3

CLUSTER = "tests/cluster/"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Processes that share the tests: one takes all of `tests/cluster`, a file goes to one."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return CLUSTER if file.startswith(CLUSTER) else file

    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`tests/cluster` first, other files that start Ray last, so that seldom two run at once."""
    ray = {item.path for item in items if item.get_closest_marker("cluster")}
    items.sort(key=lambda item: not item.nodeid.startswith(CLUSTER) and 1 + (item.path in ray))


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
    """URL of an empty database, as `NIPQ_STORAGE_URL` names it."""
    url = postgres.new_database(f"test_{uuid.uuid4().hex[:12]}")
    monkeypatch.setenv("NIPQ_STORAGE_URL", url)
    return url


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A real S3 server with an empty bucket, and keys to it in the environment."""
    server = S3(monkeypatch)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """One torch thread: small tensors gain nothing from more, and results do not depend on it."""
    torch.set_num_threads(1)
