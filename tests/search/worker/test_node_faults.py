"""Faults of the environment: a full or lost GPU, data missing on a node, a failing disk."""

from __future__ import annotations

import errno
import json
import os
import pickle

import pytest
import torch
from torch._utils import ExceptionWrapper
from unit_helpers import Bench, digits, make_config

from nipq_search.errors import UserError
from nipq_search.search import jobs
from nipq_search.search.jobs import LOCK_FILE, OutcomeKind
from nipq_search.search.worker import failures
from nipq_search.search.worker.worker import execute
from nipq_search.tasks.vision.digits import Digits


class Left(BaseException):
    """The process would have ended."""


class Failing(Digits):
    """A digits task whose evaluation raises `error` if it is set."""

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
    """The first trial of a sweep that has its float model."""
    coordinator = bench.open()
    while (found := coordinator.next_job()).kind != "trial":
        execute(found, task, lambda report: None)
        coordinator.finished(found)
    return found


@pytest.fixture
def left(monkeypatch):
    """Raise `Left` instead of ending the process."""

    def leave(status):
        raise Left(status)

    monkeypatch.setattr(os, "_exit", leave)


def test_gpu_out_of_memory_ends_the_process_but_not_the_trial(task, job, left):
    task.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(Left):
        execute(job, task, lambda report: None)
    assert jobs.committed_record(job.folder) is None
    assert failures.record_causes(job.folder, job.run) == jobs.Cause.GPU_MEMORY, (
        "regardless of Ray's error"
    )
    assert jobs.crash_causes(job.folder, job.run) == [jobs.Cause.GPU_MEMORY]
    assert "Tried to allocate" in (jobs.attempts(job.folder)[0] / jobs.TRACEBACK).read_text()
    task.error = None
    assert execute(job, task, lambda report: None).kind is OutcomeKind.COMPLETE


def test_a_trial_too_large_for_a_gpu_is_given_up_with_the_fix(task, job, left):
    task.error = torch.OutOfMemoryError("CUDA out of memory")
    for _ in range(3):
        with pytest.raises(Left):
            execute(job, task, lambda report: None)
    assert execute(job, task, lambda report: None).kind is OutcomeKind.FAIL
    reason = jobs.committed_record(job.folder)["reason"]
    assert reason.startswith("its process died 3 times (limits.max_failures): its GPU ran out")
    assert "resources.gpus" in reason and "train.batch_size" in reason


def test_a_lost_gpu_affects_no_further_trial(task, job, left, monkeypatch):
    """Every later call on the GPU would fail, so the process ends after the record is written."""
    task.error = RuntimeError("CUDA error: device-side assert triggered")
    monkeypatch.setattr(failures, "gpu_is_lost", lambda: True)
    with pytest.raises(Left):
        execute(job, task, lambda report: None)
    assert "device-side assert" in jobs.committed_record(job.folder)["reason"]
    assert execute(job, task, lambda report: None).kind is OutcomeKind.FAIL, "read from the record"


def test_no_gpu_is_lost_without_a_gpu():
    assert not failures.gpu_is_lost() or torch.cuda.is_available()


def sign(bench, host):
    (bench.out / LOCK_FILE).write_text(json.dumps({"host": host, "pid": 1, "run": "x"}))


def raised_from(error):
    """Wrap an error as the project's own readers do."""
    said = UserError("/data/train/7.png: cannot be read")
    said.__cause__ = error
    return said


def from_worker(error):
    """Re-raise an error as `DataLoader` does for its workers."""
    try:
        raise error
    except OSError:
        caught = ExceptionWrapper(where="in DataLoader worker process 0")
    try:
        caught.reraise()
    except OSError as found:
        return found


@pytest.mark.parametrize("told", [lambda error: error, raised_from, from_worker])
@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE, errno.EACCES])
def test_data_missing_on_one_node_fails_no_trial(bench, task, job, monkeypatch, number, told):
    """Otherwise, trials on the node without the data would fail quickly until none is left."""
    task.error = told(OSError(number, os.strerror(number), "/data/train/7.png"))
    sign(bench, "the-driver-s-host")
    there = ("the-driver-s-host", "/data/train/7.png")
    monkeypatch.setattr(failures, "file_exists_on", lambda host, file: (host, file) == there)
    outcome = execute(job, task, lambda report: None)
    assert outcome.kind is OutcomeKind.HALT
    assert outcome.reason.startswith(f"node {os.uname().nodename}: ")
    assert "/data/train/7.png" in outcome.reason and "mount the file there" in outcome.reason
    assert (
        jobs.committed_record(job.folder) is None and jobs.crash_causes(job.folder, job.run) == []
    )
    task.error = None
    assert execute(job, task, lambda report: None).kind is OutcomeKind.COMPLETE


@pytest.mark.parametrize("host", [os.uname().nodename, "another-host"])
def test_a_file_missing_on_the_drivers_host_too_fails_the_trial(bench, task, job, host):
    task.error = FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/7.png")
    sign(bench, host)
    assert execute(job, task, lambda report: None).kind is OutcomeKind.FAIL


@pytest.mark.parametrize("told", [raised_from, from_worker])
def test_a_disk_error_behind_another_error_fails_no_trial(task, job, told):
    task.error = told(OSError(errno.EIO, "Input/output error", "/data/train/7.png"))
    outcome = execute(job, task, lambda report: None)
    assert outcome.kind is OutcomeKind.HALT
    assert outcome.reason.startswith("/data/train/7.png: Input/output error")
    assert jobs.committed_record(job.folder) is None


def test_a_pickled_error_keeps_its_attributes():
    error = raised_from(FileNotFoundError(2, "No such file or directory", "/data/7.png"))
    error.below = error.__cause__
    there = pickle.loads(pickle.dumps(error))
    assert str(there) == str(error) and there.below.filename == "/data/7.png"


@pytest.mark.parametrize(
    ("error", "room"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (ValueError("CUDA error: out of memory"), True),
    ],
)
def test_all_gpu_memory_errors_are_recognized(error, room):
    assert failures.is_gpu_out_of_memory(error) is not room


class Unfit(Failing):
    """A digits task that fails on the test split only."""

    def evaluate(self, model, split):
        if split == "test" and self.error is not None:
            raise self.error
        return Digits.evaluate(self, model, split)


@pytest.fixture
def evaluation(tmp_path):
    """The task and `test` job of a sweep whose trials have finished."""
    task = Unfit()
    bench = Bench(tmp_path / "whole", make_config(search__trials=2))
    coordinator = bench.open()
    while (found := coordinator.next_job()).kind != "test":
        execute(found, task, lambda report: None)
        coordinator.finished(found)
    return task, found


def test_a_gpu_lost_on_the_test_split_fails_the_evaluation_once(evaluation, left, monkeypatch):
    """Otherwise the evaluation would be restarted forever."""
    task, job = evaluation
    task.error = RuntimeError("CUDA error: device-side assert triggered")
    monkeypatch.setattr(failures, "gpu_is_lost", lambda: True)
    assert execute(job, task, lambda report: None).kind is OutcomeKind.FAIL


def test_a_disk_error_on_the_test_split_ends_the_sweep(evaluation):
    task, job = evaluation
    task.error = OSError(errno.EIO, "Input/output error", "/data/test/7.png")
    outcome = execute(job, task, lambda report: None)
    assert outcome.kind is OutcomeKind.HALT and outcome.reason.startswith("/data/test/7.png")
    task.error = None
    assert execute(job, task, lambda report: None).kind is OutcomeKind.COMPLETE
