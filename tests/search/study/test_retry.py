"""Retries during an outage of the study's server."""

from __future__ import annotations

import contextlib
import threading

import pytest
from optuna.exceptions import StorageInternalError
from unit_helpers import digits, make_config

from nipq_search.search.run import open_ledger
from nipq_search.search.study import retry
from nipq_search.search.study.database_lease import LeaseLost


class Lease:
    """A lease that a test can revoke."""

    def __init__(self):
        self.lost, self.checks = False, 0

    def check(self):
        self.checks += 1
        if self.lost:
            raise LeaseLost("held by another driver")


@pytest.fixture
def lease():
    return Lease()


@pytest.fixture
def ledger(database, tmp_path, lease):
    """A ledger in PostgreSQL with one running trial."""
    (tmp_path / "sweep").mkdir()
    ledger, _ = open_ledger(make_config(), digits(), tmp_path / "sweep", lease.check)
    with contextlib.closing(ledger):
        ledger.ask(0, 2)
        yield ledger


def test_a_short_outage_is_waited_out(ledger, postgres):
    postgres.stop()
    later = threading.Timer(1.5, postgres.start)
    later.start()
    try:
        ledger.complete(0, [0.5, 100.0], {"samples": 1}, -0.01)
    finally:
        later.join()
    (trial,) = ledger.trials()
    assert trial.state.name == "COMPLETE" and trial.user_attrs["samples"] == 1


def test_long_outages_raise_and_a_lost_lease_ends_the_retries(
    ledger, lease, postgres, monkeypatch
):
    monkeypatch.setattr(retry, "OUTAGE_SECONDS", 1.0)
    postgres.stop()
    try:
        with pytest.raises(StorageInternalError):
            ledger.trials()
        lease.lost, before = True, lease.checks
        with pytest.raises(LeaseLost):
            ledger.trials()
        assert lease.checks == before + 1
    finally:
        postgres.start()
