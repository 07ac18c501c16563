"""Execution of a job in a worker process: one attempt, and everything that can go wrong in it."""

from __future__ import annotations

import enum
import logging
import math
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from nipq_search import blobs, file_io
from nipq_search.search import jobs
from nipq_search.search.config.sweep_config import SweepConfig, parse_config
from nipq_search.search.jobs import Job, JobOutcome, OutcomeKind
from nipq_search.search.worker import failures
from nipq_search.search.worker.process_group import RankKilled
from nipq_search.search.worker.provenance import provenance
from nipq_search.search.worker.reporter import Reporter
from nipq_search.search.worker.run_job import failure_record, run_job
from nipq_search.search.worker.watchdog import captured, watchdog
from nipq_search.tasks import Task
from nipq_search.train import Interrupted, Paused
from nipq_search.train.checkpoint import remove_checkpoints
from nipq_search.train.models import MODEL_FILE

_log = logging.getLogger("nipq_search")


class ExitReason(enum.Enum):
    """Why a worker process exits instead of taking another job."""

    RANK_KILLED = "another process of its training run was killed"
    GPU_MEMORY = "its GPU ran out of memory"
    GPU_LOST = "its GPU is no longer usable"


class _EndProcess(Exception):
    """The process must end; the executor restarts the job in a new one."""

    def __init__(self, reason: ExitReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class _MissingHere(Exception):
    """A file that a job needs does not exist on this node."""


def execute(job: Job, task: Task, report: Callable[[dict[str, Any]], None]) -> JobOutcome:
    """Run one attempt of a job, unless the job has a committed record.

    A job that has reached a limit on its failures is recorded as failed instead. If the GPU must
    be released or another rank of the training run was killed, this function ends the process
    instead of returning; the executor then restarts the job.

    Args:
        job: the job to run.
        task: the sweep's task, with its data loaded.
        report: called after every epoch with a dictionary of `epoch` and `job`, the job's name.

    Returns:
        How the attempt ended.

    Raises:
        OSError: an operation outside the training run failed, and the machine is not at fault.
    """
    try:
        return _attempt(job, task, report)
    except _EndProcess as end:
        _end_process(end.reason)
    except OSError as error:
        if not failures.is_machine_fault(error, Path(job.out)):
            raise
        place = error.filename or job.out
        return _halted(
            f"{place}: {error.strerror}; fix this, then run the same command again to resume the "
            "sweep"
        )
    except _MissingHere as error:
        return _halted(
            f"node {socket.gethostname()}: {error}; copy or mount the file there, or remove the "
            "node, then run the same command again to resume the sweep"
        )


def _halted(reason: str) -> JobOutcome:
    """Return the outcome for a fault of the machine: the job stays open, and the sweep ends."""
    return JobOutcome(kind=OutcomeKind.HALT, reason=reason)


def _end_process(reason: ExitReason) -> NoReturn:
    """End this process immediately, which releases all its GPU memory."""
    _log.error("this worker process ends: %s", reason.value)
    os._exit(1)


def _attempt(job: Job, task: Task, report: Callable[[dict[str, Any]], None]) -> JobOutcome:
    """Run one attempt; see `execute`.

    Raises:
        OSError: the machine is at fault, or an operation outside the training run failed; nothing
            is recorded for the job.
        _MissingHere: a file that the job needs does not exist on this node.
        _EndProcess: the process must end.
    """
    done = jobs.committed_record(job.folder) if job.kind != "test" else None
    if done is not None:
        return JobOutcome(kind=OutcomeKind(done["state"]))
    config = parse_config(dict(job.config))
    gave_up = _reason_to_give_up(job, config)
    threads, workers = _choose_threads(job, config), config.resources.processes
    setup = {"threads": threads, "workers": workers, "parent": job.parent}
    try:
        attempt = jobs.open_attempt(job, failures.own_node(), **setup)
    except jobs.AlreadyCommitted:
        return _attempt(job, task, report)
    if gave_up:
        failure = {**failure_record(job, gave_up), "provenance": provenance(config)}
        is_mine = jobs.commit(attempt, failure)
        return JobOutcome(kind=OutcomeKind.FAIL if is_mine else OutcomeKind.SUPERSEDED)
    minutes = config.limits.trial_minutes if job.kind in ("trial", "baseline") else None
    reporter = Reporter(job, attempt, report)
    torch.set_num_threads(threads)
    with captured(attempt / jobs.LOG), watchdog(attempt / jobs.HANG, minutes):
        try:
            record = run_job(job, config, task, reporter)
        except Paused as paused:
            return _pause(job, reporter, paused)
        except Interrupted:
            reporter.write()
            _clean_up(job)
            _mark_stopped(attempt)
            return JobOutcome(kind=OutcomeKind.STOPPED)
        except RankKilled as error:
            raise _EndProcess(ExitReason.RANK_KILLED) from error
        except Exception as error:
            record = _record_of_error(job, reporter, error)
    setup_of_result = {"threads": threads, "workers": workers, "provenance": provenance(config)}
    return _commit(job, reporter, {**record, **setup_of_result})


# Ends of an attempt


def _pause(job: Job, reporter: Reporter, paused: Paused) -> JobOutcome:
    """Record what a trial measured at its rung, and return the outcome of the attempt."""
    metrics = {name: v for name, v in paused.metrics.items() if math.isfinite(v)}
    reporter.write()
    jobs.record_rung(job.folder, job.rung, {"metrics": metrics, "samples": paused.samples})
    _mark_stopped(reporter.attempt)
    return JobOutcome(kind=OutcomeKind.PAUSED)


def _record_of_error(job: Job, reporter: Reporter, error: Exception) -> dict[str, Any]:
    """Return the failure record of a job that raised an error, unless the job is not at fault.

    Raises:
        OSError: the machine is at fault.
        _MissingHere: a file that the job needs does not exist on this node.
        _EndProcess: the GPU ran out of memory.
    """
    attempt, out = reporter.attempt, Path(job.out)
    if failures.is_machine_fault(error, out):
        raise failures.find_os_error(error) or error from None
    (attempt / jobs.TRACEBACK).write_text(traceback.format_exc())
    reason = " ".join(str(error).split()) or type(error).__name__
    if failures.is_missing_only_here(error, out):
        _mark_stopped(attempt)
        raise _MissingHere(reason) from error
    if failures.is_gpu_out_of_memory(error):
        reporter.write()
        jobs.record_cause(attempt, jobs.Cause.GPU_MEMORY, reason[:500])
        raise _EndProcess(ExitReason.GPU_MEMORY) from error
    return failure_record(job, f"{type(error).__name__}: {reason}"[:500])


def _commit(job: Job, reporter: Reporter, record: dict[str, Any]) -> JobOutcome:
    """Commit the record of an attempt, unless a later attempt has taken over the job.

    Also deletes files that are no longer needed.

    Returns:
        The outcome of the attempt.

    Raises:
        _EndProcess: the job failed and left the GPU unusable; otherwise, Tune would reuse this
            process for the next job.
    """
    attempt = reporter.attempt
    reporter.write()
    record["seconds"] = jobs.seconds_spent(job.folder)
    if not (is_mine := jobs.commit(attempt, record)):
        blobs.remove(attempt / MODEL_FILE)
        _mark_stopped(attempt)
    _clean_up(job)
    if record["state"] == jobs.FAIL and job.kind != "test" and failures.gpu_is_lost():
        raise _EndProcess(ExitReason.GPU_LOST)
    return JobOutcome(kind=OutcomeKind(record["state"]) if is_mine else OutcomeKind.SUPERSEDED)


def _mark_stopped(attempt: Path) -> None:
    """Record that an attempt ended in an orderly way, but without a result."""
    file_io.write_json(attempt / jobs.STOPPED, {"time": time.time()})


def _clean_up(job: Job) -> None:
    """Delete the checkpoints and obsolete models of a job if it has a committed record."""
    if job.kind != "test" and jobs.committed_record(job.folder) is not None:
        remove_checkpoints(job.folder / "checkpoints")
        for model in jobs.model_files(job.folder, obsolete=True):
            blobs.remove(model)


# Before an attempt


def _choose_threads(job: Job, config: SweepConfig) -> int:
    """Return the number of threads for a job's next attempt, and delete unusable checkpoints.

    A resumed training run is bit-identical to an uninterrupted one only if it has the same number
    of threads, the same number of workers and the same parent. If the attempt can resume from a
    checkpoint, it therefore gets the previous attempt's number of threads. Checkpoints written
    with a different number of workers or a different parent are deleted.
    """
    checkpoints, before = job.folder / "checkpoints", jobs.training_setup(job.folder)
    if not checkpoints.is_dir() or not before:
        return config.resources.cpus
    if (before["workers"], before["parent"]) == (config.resources.processes, job.parent):
        return int(before["threads"])
    remove_checkpoints(checkpoints)
    return config.resources.cpus


def _reason_to_give_up(job: Job, config: SweepConfig) -> str | None:
    """Return why a job should not be attempted again, or None if it should.

    Before a reason is returned, the function waits until it is certain which attempts were lost
    with their nodes, because those do not count.
    """
    limits = config.limits
    failures.record_causes(job.folder, job.run)
    reason = _limit_reached(job, limits.max_failures, limits.trial_minutes)
    if reason:
        failures.await_node_states(job.folder, job.run)
        reason = _limit_reached(job, limits.max_failures, limits.trial_minutes)
    return reason


def _limit_reached(job: Job, max_failures: int, minutes: float | None) -> str | None:
    """Return the reason for failing a job whose recorded attempts reached a limit, or None."""
    if jobs.count_hangs(job.folder) >= jobs.MAX_HANGS:
        limit = "" if minutes is None else f" after {minutes:g} minutes"
        return f"hung: killed{limit}, twice (limits.trial_minutes)"
    causes = jobs.crash_causes(job.folder, job.run)
    if len(causes) < max_failures:
        return None
    fix = failures.FIXES.get(causes[-1])
    explanation = f": {fix}" if fix else ""
    return f"its process died {len(causes)} times (limits.max_failures){explanation}"
