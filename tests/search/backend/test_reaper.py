"""The reaper kills the processes that outlive a killed driver, and no others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nipq_search.search.backend.reaper import descendants, process_tree

DRIVER = """
import subprocess, sys, time
from nipq_search.search.backend.reaper import reap_ray_processes
# Stand-ins for a Ray daemon that starts an agent and for a child unrelated to Ray.
sleep = "import time; time.sleep(600)"
other = subprocess.Popen([sys.executable, "-c", sleep])
with reap_ray_processes():
    agent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    daemon = subprocess.Popen([sys.executable, "-c", agent, "/site/ray/core/src/raylet"])
    late = subprocess.Popen([sys.executable, "-c", sleep, "mine"])
    print(other.pid, late.pid, daemon.pid, flush=True)
    if sys.argv[1] == "hang":
        time.sleep(600)
    time.sleep(2)
"""


def alive(pids):
    return {pid for pid in pids if pid in process_tree()}


def start(mode):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, mode], stdout=subprocess.PIPE, text=True
    )
    other, late, daemon = map(int, driver.stdout.readline().split())
    limit = time.monotonic() + 20
    while len(below := {pid for pid, _ in descendants({daemon}, process_tree())}) < 2:
        assert time.monotonic() < limit
        time.sleep(0.05)
    return driver, {other, late}, below


def gone(pids):
    limit = time.monotonic() + 20
    while alive(pids):
        assert time.monotonic() < limit, alive(pids)
        time.sleep(0.05)


def check(mode, end):
    driver, others, ray = start(mode)
    try:
        time.sleep(1.5)  # the reaper scans once a second
        end(driver)
        driver.wait(timeout=20)
        gone(ray)
        assert alive(others) == others
    finally:
        driver.stdout.close()
        for pid in others:
            os.kill(pid, signal.SIGKILL)


def test_a_killed_driver_leaves_no_daemon():
    check("hang", lambda driver: driver.kill())


def test_daemons_that_linger_after_a_shutdown_are_ended():
    check("finish", lambda driver: None)


def test_descendants_are_found_by_id_and_start():
    tree = {1: (0, "a"), 5: (1, "b"), 6: (5, "c"), 7: (6, "d"), 8: (1, "e")}
    assert descendants({5}, tree) == {(5, "b"), (6, "c"), (7, "d")}
    assert descendants({99}, tree) == set()
    assert Path("/proc/self").exists() and os.getpid() in process_tree()
