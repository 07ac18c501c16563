"""The lease of a study in PostgreSQL when drivers die or the server is unreachable."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time

import pytest
import sqlalchemy as sa
from unit_helpers import ledger_of, make_config, run_here

from nipq_search.cli import main
from nipq_search.errors import UserError
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.study import database_lease
from nipq_search.search.study.database_lease import LeaseLost, StorageLease, study_lease

STUDY = "a-study"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Shorten the intervals of the lease."""
    for name, seconds in {"BEAT": 0.1, "SILENT": 0.8, "EXPIRY": 1.6}.items():
        monkeypatch.setattr(database_lease, f"{name}_SECONDS", seconds)


@pytest.fixture
def table(database):
    """An engine with which tests read and change the table of leases."""
    engine = sa.create_engine(database)
    database_lease._make_table(engine)
    yield engine
    engine.dispose()


def put(engine, **changes):
    row = {"study": STUDY, "token": "theirs", "host": "elsewhere", "pid": 7, "beat": 3} | changes
    with engine.begin() as connection:
        connection.execute(database_lease._TABLE.delete())
        connection.execute(database_lease._TABLE.insert().values(**row))


def row(engine):
    return database_lease._row(engine, STUDY)


def wait_for(condition, seconds=20):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_one_of_several_concurrent_starts_succeeds(database):
    """The table of leases does not exist yet when the drivers start."""
    outcomes, together = [], threading.Barrier(5)
    done = threading.Event()

    def start(number):
        together.wait()
        try:
            with study_lease(STUDY, f"token-{number}") as check:
                check()
                outcomes.append("won")
                done.wait(20)
                check()
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=start, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(outcomes) == 5)
    done.set()
    for thread in threads:
        thread.join()
    lost = [text for text in outcomes if text != "won"]
    assert len(lost) == 4
    assert all("a driver is running the sweep 'a-study' on host" in text for text in lost)
    engine = sa.create_engine(database)
    assert row(engine) is None, "the lease was released"
    with study_lease(STUDY, "later") as check:
        check()
        assert row(engine).token.endswith(".later")
    engine.dispose()


def test_a_lease_without_heartbeat_expires(table, caplog):
    put(table)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "nipq_search"), study_lease(STUDY, "mine") as check:
        assert time.monotonic() - began > database_lease.EXPIRY_SECONDS
        check()
        assert row(table).token.endswith(".mine")
    assert "host elsewhere, pid 7" in caplog.text
    assert row(table) is None


def test_a_lease_writes_nothing_before_it_starts(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/study.db")
    database_lease._make_table(engine)
    put(engine, token="mine")
    lease = StorageLease(engine, STUDY, "mine")
    time.sleep(5 * database_lease.BEAT_SECONDS)
    assert row(engine).beat == 3
    lease.start()
    wait_for(lambda: row(engine).beat > 3)
    lease.close()
    assert row(engine) is None
    engine.dispose()


def test_the_lease_of_a_dead_local_process_is_available_immediately(table, monkeypatch):
    monkeypatch.setattr(database_lease, "EXPIRY_SECONDS", 1000.0)
    script = (
        "import os, sys\nfrom nipq_search.search.study.database_lease import study_lease\n"
        f"with study_lease('{STUDY}', 'dying'):\n    os._exit(1)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 1
    token = row(table).token
    assert token.endswith(".dying")
    with study_lease(STUDY, "mine"):
        assert row(table).token.endswith(".mine")
    put(table, token="other-boot.dying", host=socket.gethostname(), pid=2**22 + 1)
    monkeypatch.setattr(database_lease, "EXPIRY_SECONDS", 0.5)
    began = time.monotonic()
    with study_lease(STUDY, "mine"):
        assert time.monotonic() - began > 0.5, (
            "a machine with the same host name is not the same machine"
        )


def test_a_driver_that_lost_its_lease_must_not_write(table):
    with study_lease(STUDY, "mine") as check:
        check()
        put(table)
        wait_for(lambda: not_held(check))
        time.sleep(3 * database_lease.BEAT_SECONDS)
    assert row(table).token == "theirs", "the driver does not release another driver's lease"


def not_held(check):
    try:
        check()
    except LeaseLost as error:
        assert "run the same command again" in str(error)
        return True
    return False


def test_a_driver_without_its_server_considers_the_lease_lost(database, postgres):
    with study_lease(STUDY, "mine") as check:
        postgres.stop()
        try:
            wait_for(lambda: not_held(check))
        finally:
            postgres.start()
        wait_for(lambda: not not_held(check))  # no other driver took it in the meantime


def test_a_lease_renewed_in_the_meantime_is_not_taken(table):
    """The swap fails if the counter has changed since it was read."""
    put(table, beat=3)
    old = row(table)
    put(table, beat=4)
    mine = {"study": STUDY, "token": "mine", "host": "here", "pid": 1, "beat": 0}
    assert not database_lease._swap(table, old, mine)
    assert database_lease._swap(table, row(table), mine)
    assert not database_lease._insert(table, mine)


@pytest.mark.parametrize("change", ["password", "port", "database", "scheme", "text"])
def test_unusable_storage_gives_a_one_line_error_without_the_password(
    change, database, postgres, monkeypatch, tmp_path, capsys
):
    bad = {
        "password": database.replace(postgres.password, "wr0ng-word"),
        "port": database.replace(f":{postgres.port}/", ":9/"),
        "database": database + "_not_there",
        "scheme": database.replace("postgresql", "oracle"),
        "text": f"{postgres.password}@somewhere",
    }[change]
    monkeypatch.setenv("NIPQ_STORAGE_URL", bad)
    (tmp_path / "sweep.yaml").write_text(
        "{name: x, task: digits, budgets: [{bops: uniform 4}], search: {space: {}}}"
    )
    out = tmp_path / "out"
    assert main(["run", str(tmp_path / "sweep.yaml"), "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: NIPQ_STORAGE_URL: ")
    assert postgres.password not in error and "wr0ng-word" not in error
    assert not out.exists()


def test_a_sweep_on_postgres_resumes_and_stops_without_its_lease(
    database, table, tmp_path, monkeypatch
):
    config = make_config(search__trials=2, search__baselines=[])
    out = tmp_path / "sweep"
    assert run_here(config, out).complete == 2
    assert not (out / "study.log").exists() and row(table) is None
    assert len(Sweep.open(out).trials()) == 2

    def stolen(self):
        raise LeaseLost("gone")

    before = {path: path.read_bytes() for path in out.glob("*.*") if path.is_file()}
    monkeypatch.setattr(StorageLease, "check", stolen)
    more = make_config(search__trials=4, search__baselines=[])
    with pytest.raises(LeaseLost):
        run_here(more, out)
    after = {path: path.read_bytes() for path in out.glob("*.*") if path.is_file()}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {"driver.lock", "sweep.yaml", "facts.json"}, "nothing else was written"
    monkeypatch.undo()
    monkeypatch.setenv("NIPQ_STORAGE_URL", database)
    with contextlib.closing(ledger_of(out, more)) as ledger:
        assert len(ledger.trials()) == 2
    assert run_here(more, out).complete == 4


def test_queries_time_out_if_the_connection_is_cut(database):
    """A cut cable cannot be simulated here, so check the timeouts that libpq receives."""
    engine = database_lease.make_engine(database)
    with engine.connect() as connection:
        told = connection.connection.driver_connection.info.get_parameters()
    engine.dispose()
    assert 0 < int(told["tcp_user_timeout"]) <= 20_000
    silent = int(told["keepalives_idle"])
    silent += int(told["keepalives_interval"]) * int(told["keepalives_count"])
    assert 0 < silent <= 20
