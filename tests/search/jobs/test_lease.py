"""The folder's lock admits one driver at a time and is released however the driver ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from nipq_search.errors import UserError
from nipq_search.search.jobs import LOCK_FILE
from nipq_search.search.jobs.lease import driver_lease, live_driver, request_stop, stop_requested

HOLDER = """
import sys
from pathlib import Path
from nipq_search.search.jobs.lease import driver_lease
with driver_lease(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that locks the sweep in `tmp_path` until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.stdin.close()
    process.stdout.close()
    process.wait()


def test_a_second_driver_gets_an_error_with_host_and_pid(holder, tmp_path):
    with pytest.raises(UserError) as caught, driver_lease(tmp_path):
        pass
    message = str(caught.value)
    assert f"host {socket.gethostname()}, pid {holder.pid}" in message
    assert f"nipq-search stop {tmp_path}" in message and "\n" not in message
    assert live_driver(tmp_path)["pid"] == holder.pid


def test_a_killed_driver_releases_the_lease(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert live_driver(tmp_path) is None
    with driver_lease(tmp_path):
        assert live_driver(tmp_path)["pid"] == os.getpid()


def test_stop_requests_reach_live_drivers_only(holder, tmp_path):
    assert request_stop(tmp_path / "none") is None
    assert request_stop(tmp_path) == f"host {socket.gethostname()}, pid {holder.pid}"
    assert stop_requested(tmp_path)
    holder.kill()
    holder.wait()
    assert request_stop(tmp_path) is None
    with driver_lease(tmp_path):
        assert not stop_requested(tmp_path), "an earlier request does not stop a new driver"


def test_every_lease_has_a_unique_token(tmp_path):
    with driver_lease(tmp_path / "sweep") as first:
        assert (tmp_path / "sweep" / LOCK_FILE).exists()
    with driver_lease(tmp_path / "sweep") as second:
        pass
    assert first != second
    assert live_driver(tmp_path / "sweep") is None


def test_an_error_releases_the_lease(tmp_path):
    with pytest.raises(RuntimeError), driver_lease(tmp_path):
        raise RuntimeError
    with driver_lease(tmp_path):
        pass
