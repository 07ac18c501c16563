"""Conformance suite of the `Executor` protocol, run against every executor."""

from __future__ import annotations

import functools
import os
import pickle
import time
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from sweep_helpers import warm_start
from unit_helpers import make_config

from nipq_search import file_io
from nipq_search.search import jobs
from nipq_search.search.backend import ray_compat, tune_callbacks
from nipq_search.search.backend.tune import TuneExecutor, ray_cluster
from nipq_search.search.backend.virtual import Died, VirtualExecutor
from nipq_search.search.config.resources import ResourcesSection
from nipq_search.search.coordinator.coordinator import Verdict
from nipq_search.search.jobs import Job, JobOutcome, OutcomeKind
from nipq_search.search.worker import failures

FINE, DIES_ONCE, NEVER_STARTS, UNFIT, UNSEEN = range(5)


def work(job, task, report, *, die):
    """Simulate a job that behaves as `params["mood"]` selects; write its attempt and record."""
    mood = job.params["mood"]
    if mood == NEVER_STARTS:
        die()
    attempt = jobs.open_attempt(job)
    if mood == UNFIT:
        return JobOutcome(kind=OutcomeKind.HALT, reason="no room")
    if mood == UNSEEN:  # the record was written to the local disk of another node
        return JobOutcome(kind=OutcomeKind.COMPLETE)
    if mood == DIES_ONCE and len(jobs.attempts(job.folder)) == 1:
        die()
    began = time.time()
    report({"epoch": 1})
    if not task.quick:
        time.sleep(0.5)
    jobs.commit(attempt, {"state": jobs.COMPLETE, "began": began, "ended": time.time()})
    return JobOutcome(kind=OutcomeKind.COMPLETE)


def die_for_real():
    os._exit(1)


def die_in_words():
    raise Died


class Plain:
    """Substitute for a task."""

    def __init__(self, quick):
        self.quick = quick


class Script:
    """Coordinator of scripted jobs; the first job runs alone, like the float model."""

    def __init__(self, out, moods):
        config = make_config().as_json()
        self.waiting = [
            Job(
                kind="trial",
                number=number,
                out=str(out),
                config=config,
                run="now",
                seed=number,
                params={"mood": mood},
            )
            for number, mood in enumerate(moods)
        ]
        self.running, self.ended, self.reason = {}, [], None
        self.stopping, self.failure = False, ""
        self.most = 0

    def has_work(self):
        return bool(self.waiting)

    def next_job(self):
        if self.reason is not None:
            return Verdict.DONE
        if not self.waiting or 0 in self.running:
            return Verdict.WAIT if self.running else Verdict.DONE
        job = self.waiting.pop(0)
        self.running[job.number] = job
        self.most = max(self.most, len(self.running))
        return job

    def finished(self, job, lost=None):
        del self.running[job.number]
        self.ended.append((job.number, lost))

    def halt(self, reason):
        self.reason = reason


def ray_cluster_here(patch, resources):
    """Start a cluster whose workers can import this module."""
    here = Path(__file__).parent
    warm = warm_start()
    warm["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), warm["PYTHONPATH"]])
    for name, value in warm.items():
        patch.setenv(name, value)
    return ray_cluster(None, resources)


@pytest.fixture(scope="module")
def tune():
    """A Tune executor with two slots on its own cluster, and a task."""
    resources = ResourcesSection(concurrent=2)
    with pytest.MonkeyPatch.context() as patch, ray_cluster_here(patch, resources):
        yield TuneExecutor(resources, functools.partial(work, die=die_for_real)), Plain(False)


@pytest.fixture(params=["virtual", pytest.param("tune", marks=pytest.mark.cluster)])
def executor(request):
    """An executor with two slots, and a task."""
    if request.param == "tune":
        return request.getfixturevalue("tune")
    return VirtualExecutor(2, functools.partial(work, die=die_in_words)), Plain(True)


def test_every_job_ends_once_whatever_happens_to_it(executor, tmp_path):
    runner, task = executor
    script, ticks = Script(tmp_path, [FINE, FINE, DIES_ONCE, NEVER_STARTS, FINE]), []
    runner.run(script, task, lambda: ticks.append(len(script.ended)))
    assert sorted(script.ended) == [
        (0, None),
        (1, None),
        (2, None),
        (3, "its process died before it could start"),
        (4, None),
    ]
    assert not script.running and not script.waiting
    assert script.most == 2, "exactly two slots were used"
    assert ticks and ticks == sorted(ticks)
    assert script.ended[0][0] == 0
    began = {n: jobs.committed_record(tmp_path / f"trials/{n}") for n in (0, 1, 2, 4)}
    assert all(began[n]["began"] >= began[0]["ended"] - 0.01 for n in (1, 2, 4)), (
        "the other jobs wait for the first one"
    )
    first, second = jobs.attempts(tmp_path / "trials/2")
    assert file_io.read_json(first / jobs.LOST)["cause"] == "process"
    assert not jobs.attempts(tmp_path / "trials/3")


def test_an_unfit_machine_ends_everything(executor, tmp_path):
    runner, task = executor
    script = Script(tmp_path, [FINE, UNFIT, FINE, FINE, FINE, FINE])
    runner.run(script, task, lambda: None)
    assert script.reason == "no room"
    assert script.waiting and not script.running


def test_nothing_is_started_where_nothing_is_to_do(executor, tmp_path):
    runner, task = executor
    runner.run(Script(tmp_path, []), task, lambda: None)


class LostLease(RuntimeError):
    pass


def test_what_the_end_of_a_job_raises_ends_the_run(executor, tmp_path, monkeypatch):
    """For example, the study's server is unavailable when a result is stored."""
    runner, task = executor

    def finished(self, job, lost=None):
        raise LostLease("no longer ours")

    monkeypatch.setattr(Script, "finished", finished)
    with pytest.raises(LostLease):
        runner.run(Script(tmp_path, [FINE] * 3), task, lambda: None)


@pytest.mark.cluster
def test_a_node_that_does_not_share_the_folder_ends_the_run(tune, tmp_path, monkeypatch):
    runner, task = tune
    monkeypatch.setattr(tune_callbacks, "_RECORD_VISIBILITY_SECONDS", 1.0)
    script = Script(tmp_path, [UNSEEN, FINE])
    runner.run(script, task, lambda: None)
    assert "all nodes must share" in script.reason and script.waiting


def test_an_out_of_memory_kill_keeps_its_cause():
    """Without the patch, Ray's actor manager aborts the whole run on this error."""
    from ray.air.execution._internal.actor_manager import RayActorManager

    seen = []

    class Task:
        _tracked_actor = type("Actor", (), {"actor_id": 1, "_on_error": None})

        @staticmethod
        def _on_error(actor, error):
            seen.append(error)

    manager = RayActorManager.__new__(RayActorManager)
    manager._failed_actor_ids = set()
    manager._cleanup_actor = lambda tracked_actor: None
    ended = OutOfMemoryError("Task was killed\ndue to the node running low on memory.")
    with pytest.raises(RuntimeError, match="unexpected"):
        manager._actor_task_failed(Task, ended)
    with ray_compat.ray_errors_as_actor_deaths():
        manager._actor_task_failed(Task, ended)
        manager._actor_task_failed(Task, ActorDiedError())
    assert [failures.classify(error, False) for error in seen] == [
        jobs.Cause.MEMORY,
        jobs.Cause.PROCESS,
    ]
    assert "running low on memory" in str(pickle.loads(pickle.dumps(seen[0])))
    with pytest.raises(RuntimeError, match="unexpected"):
        manager._actor_task_failed(Task, ended)


def test_what_a_tick_raises_ends_the_run(executor, tmp_path):
    runner, task = executor

    def tick():
        raise LostLease("no longer ours")

    script = Script(tmp_path, [FINE] * 20)
    with pytest.raises(LostLease):
        runner.run(script, task, tick)
    assert len(script.waiting) > 10


def test_virtual_time_accounts_for_idle_slots(tmp_path):
    runner = VirtualExecutor(
        2, functools.partial(work, die=die_in_words), seconds=lambda job: 10.0 + job.number
    )
    runner.run(Script(tmp_path, [FINE] * 4), Plain(True), lambda: None)
    # The first job runs alone until 10, the next two until 21 and 22, the last from 21 to 34.
    assert (runner.now, runner.busy) == (34.0, 46.0)
