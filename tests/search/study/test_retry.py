"""A study's server that is away for a moment."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from optuna.exceptions import StorageInternalError
from unit_helpers import Bench, make_config

from nipq_search.search.study import retry
from nipq_search.search.study.database_lease import LeaseLost


@pytest.fixture
def ledger(database, tmp_path):
    """A ledger in PostgreSQL with one trial that runs."""
    bench = Bench(tmp_path / "sweep", make_config())
    bench.open()
    with contextlib.closing(bench.ledger):
        bench.ledger.ask(0, 2)
        yield bench.ledger


def test_an_outage_of_seconds_is_waited_for(ledger, postgres):
    postgres.stop()
    later = threading.Timer(1.5, postgres.start)
    later.start()
    try:
        ledger.complete(0, [0.5, 100.0], {"samples": 1}, -0.01)
    finally:
        later.join()
    (trial,) = ledger.trials()
    assert trial.state.name == "COMPLETE" and trial.user_attrs["samples"] == 1


def test_a_longer_one_is_not_and_without_the_lease_nothing_is_tried_again(
    ledger, postgres, monkeypatch
):
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 1.0)
    postgres.stop()
    try:
        with pytest.raises(StorageInternalError):
            ledger.trials()
        tried = []

        def lost():
            tried.append(time.monotonic())
            raise LeaseLost("another's")

        ledger.guard = lost
        with pytest.raises(LeaseLost):
            ledger.trials()
        assert len(tried) == 1
    finally:
        postgres.start()
        ledger.guard = lambda: None
