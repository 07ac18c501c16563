"""Faults of the place where a trial runs: its GPU has no room or is lost, its node has no data."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from unit_helpers import Bench, digits, make_config

from nipq_search.search import faults, jobs
from nipq_search.search.lease import LOCK_FILE
from nipq_search.search.worker import HALT, execute
from nipq_search.tasks.digits import Digits


class Left(BaseException):
    """The process ended itself."""


class Failing(Digits):
    """Digits that fails on demand when it is evaluated."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self._splits = digits().splits()
        self.error: Exception | None = None

    def evaluate(self, model, split):
        if self.error is not None:
            raise self.error
        return super().evaluate(model, split)


@pytest.fixture
def task():
    return Failing()


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "sweep", make_config(search__trials=2))


@pytest.fixture
def job(bench, task):
    """The first trial, the float model being there."""
    coordinator = bench.open()
    while (found := coordinator.next_job()).kind != "trial":
        execute(found, task, lambda report: None)
        coordinator.finished(found)
    return found


@pytest.fixture
def left(monkeypatch):
    """Lets a test see that a process ended itself."""

    def leave(status):
        raise Left(status)

    monkeypatch.setattr(os, "_exit", leave)


def test_a_gpu_without_room_ends_the_process_and_not_the_trial(task, job, left):
    task.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(Left):
        execute(job, task, lambda report: None)
    assert jobs.committed(job.folder) is None
    assert faults.judge(job.folder, job.run) == faults.GPU_MEMORY, "whatever Ray says of it"
    assert jobs.crashes(job.folder, job.run) == [faults.GPU_MEMORY]
    assert "Tried to allocate" in (jobs.attempts(job.folder)[0] / jobs.TRACEBACK).read_text()
    task.error = None
    assert execute(job, task, lambda report: None) == jobs.COMPLETE


def test_a_trial_that_never_fits_on_a_gpu_is_given_up_with_the_fix(task, job, left):
    task.error = torch.OutOfMemoryError("CUDA out of memory")
    for _ in range(3):
        with pytest.raises(Left):
            execute(job, task, lambda report: None)
    assert execute(job, task, lambda report: None) == jobs.FAIL
    reason = jobs.committed(job.folder)["reason"]
    assert reason.startswith("its process died 3 times (limits.max_failures): its GPU ran out")
    assert "resources.gpus" in reason and "train.batch_size" in reason


def test_a_lost_gpu_takes_no_further_trial_along(task, job, left, monkeypatch):
    """Every later call on it would fail: the record stays, the process goes."""
    task.error = RuntimeError("CUDA error: device-side assert triggered")
    monkeypatch.setattr(faults, "gpu_is_lost", lambda: True)
    with pytest.raises(Left):
        execute(job, task, lambda report: None)
    assert "device-side assert" in jobs.committed(job.folder)["reason"]
    assert execute(job, task, lambda report: None) == jobs.FAIL, "from its record"


def test_without_a_gpu_none_is_lost():
    assert not faults.gpu_is_lost() or torch.cuda.is_available()


def sign(bench, host):
    (bench.out / LOCK_FILE).write_text(json.dumps({"host": host, "pid": 1, "run": "x"}))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE, errno.EACCES])
def test_data_that_are_not_on_a_node_fail_no_trial(bench, task, job, number):
    """The driver's host had them; the node that has not would else draw trial after trial."""
    task.error = OSError(number, os.strerror(number), "/data/train/7.png")
    sign(bench, "the-driver-s-host")
    state = execute(job, task, lambda report: None)
    assert state.startswith(f"{HALT}node {os.uname().nodename}: ")
    assert "/data/train/7.png" in state and "mount it there" in state
    assert jobs.committed(job.folder) is None and jobs.crashes(job.folder, job.run) == []
    task.error = None
    assert execute(job, task, lambda report: None) == jobs.COMPLETE


def test_a_file_that_is_missing_on_the_driver_s_host_too_is_the_trial_s_fault(bench, task, job):
    task.error = FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/7.png")
    sign(bench, os.uname().nodename)
    assert execute(job, task, lambda report: None) == jobs.FAIL
