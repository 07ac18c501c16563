"""Settings of the whole test run."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
import torch
from postgres_server import Postgres
from s3_server import S3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What processes that share the tests take as one, and in which order.

    All of `tests/cluster` goes to one process, at once, and every other file as a whole to one;
    files that start Ray come last, so that it seldom runs twice at a time.
    """
    ray = {item.path for item in items if item.get_closest_marker("cluster")}

    def alone(item: pytest.Item) -> bool:
        return item.path.parent.name == "cluster"

    items.sort(key=lambda item: not alone(item) and 1 + (item.path in ray))
    for item in items:
        group = "cluster" if alone(item) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


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
