"""Causes of lost attempts, from Ray's error and the state of the node."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
from unit_helpers import make_config

from nipq_search import file_io
from nipq_search.search import jobs
from nipq_search.search.backend.base import MAX_FAILED_STARTS
from nipq_search.search.backend.tune_callbacks import JobSearcher
from nipq_search.search.jobs import Job
from nipq_search.search.worker import failures
from nipq_search.search.worker.worker import _limit_reached


def job_in(folder):
    config = make_config().as_json()
    return Job(kind="trial", number=3, out=str(folder), config=config, run="now", seed=1)


class OutOfMemoryError(Exception):
    """An exception with the same name as Ray's."""


@pytest.mark.parametrize(
    ("error", "dead", "cause"),
    [
        (None, False, "process"),
        (RuntimeError("The actor died unexpectedly"), False, "process"),
        (RuntimeError("The actor died because its node has died. Node Id: 1"), False, "node"),
        (RuntimeError("unavailable"), True, "node"),
        (type("ActorDiedError", (Exception,), {"preempted": True})(), False, "node"),
        (OutOfMemoryError("killed"), False, "memory"),
    ],
)
def test_causes(error, dead, cause):
    assert failures.classify(error, dead) == cause


def test_dead_nodes_use_up_no_retries_even_if_reported_late(tmp_path, monkeypatch):
    job = job_in(tmp_path)
    first, second = (jobs.open_attempt(job, node) for node in ("a", "b"))
    monkeypatch.setattr(failures, "dead_nodes", lambda: {"b"})
    assert failures.record_causes(job.folder, "now", OutOfMemoryError("no room")) == "node"
    assert (jobs.cause_of(first), jobs.cause_of(second)) == ("process", "node")
    assert jobs.crash_causes(job.folder, "now") == ["process"]
    # The death of the first node is reported late.
    monkeypatch.setattr(failures, "dead_nodes", lambda: {"a", "b"})
    assert failures.record_causes(job.folder, "now") == "node"
    assert jobs.crash_causes(job.folder, "now") == []
    assert _limit_reached(job, 1, None) is None


def test_crashes_add_up_and_out_of_memory_names_the_fix(tmp_path):
    job = job_in(tmp_path)
    for _ in range(2):
        jobs.open_attempt(job)
        assert failures.record_causes(job.folder, "now") == "process"
    assert _limit_reached(job, 3, None) is None
    jobs.open_attempt(job)
    assert failures.record_causes(job.folder, "now", OutOfMemoryError("no room")) == "memory"
    reason = _limit_reached(job, 3, None)
    assert "died 3 times" in reason and "resources.memory_gb" in reason
    assert file_io.read_json(jobs.attempts(job.folder)[2] / jobs.LOST)["detail"] == "no room"


def test_attempts_of_an_earlier_driver_and_ended_ones_are_not_lost(tmp_path):
    job = job_in(tmp_path)
    jobs.open_attempt(Job(**{**job.as_json(), "run": "before"}))
    stopped = jobs.open_attempt(job)
    file_io.write_json(stopped / jobs.STOPPED, {"time": 0})
    assert failures.record_causes(job.folder, "now") is None
    assert not list(tmp_path.rglob(jobs.LOST))


def test_an_unreadable_error_is_ignored(tmp_path):
    (tmp_path / "error.pkl").write_bytes(b"no pickle")
    for file in (tmp_path / "error.pkl", tmp_path / "absent.pkl", None):
        assert failures.tune_trial_error(SimpleNamespace(pickled_error_file=file)) is None


def test_nodes_that_die_before_their_job_begins_do_not_count_against_it(tmp_path):
    """Deaths of nodes are retried without limit; deaths of processes are not."""
    searcher = JobSearcher(SimpleNamespace(next_job=lambda: job_in(tmp_path)))
    searcher.suggest("a")
    trial = SimpleNamespace(trial_id="a", pickled_error_file=str(tmp_path / "error.pkl"))

    def dies(text):
        Path(trial.pickled_error_file).write_bytes(pickle.dumps(RuntimeError(text)))
        searcher.on_process_restart(trial)
        return trial.max_failures

    assert {dies("its node has died") for _ in range(2 * MAX_FAILED_STARTS)} == {-1}
    deaths = [dies("exit code 1") for _ in range(MAX_FAILED_STARTS)]
    assert deaths == [-1] * (MAX_FAILED_STARTS - 1) + [0]
