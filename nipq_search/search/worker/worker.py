"""What happens in a worker process: one attempt of one job, whatever befalls it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nipq_search import blobs, storage
from nipq_search.cost import layer_rows
from nipq_search.cost.base import hard_bits
from nipq_search.errors import UserError, nearest
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.records import CurvePoint
from nipq_search.search import jobs
from nipq_search.search.config.sweep_config import SweepConfig, parse_config
from nipq_search.search.jobs import TEST_FILE, Job
from nipq_search.search.jobs.lease import stop_requested
from nipq_search.search.worker import failures
from nipq_search.search.worker.process_group import MemberKilled, leading
from nipq_search.search.worker.provenance import provenance
from nipq_search.search.worker.train_spec import train_spec, training_device
from nipq_search.search.worker.watchdog import captured, watchdog
from nipq_search.tasks import Task
from nipq_search.tasks.base import evaluate
from nipq_search.train import Hooks, Interrupted, Paused, TrainResult, train
from nipq_search.train.checkpoint import remove_checkpoints
from nipq_search.train.models import MODEL_FILE, load_trained
from nipq_search.train.sensitivity import score

_POLL_SECONDS = 0.5
HALT = "HALT "
"""Begins the answer of a worker that found its machine unfit; the reason follows."""


class _Reporter:
    """Keeps an attempt's curve, its count of samples and its sign of life on disk."""

    def __init__(self, job: Job, attempt: Path, report: Callable[[dict[str, Any]], None]) -> None:
        self.job, self.attempt, self.report = job, attempt, report
        self.samples = 0
        self.epoch = 0
        self.polled = 0.0
        self.written = 0.0
        self.stopping = False

    def on_epoch(self, point: CurvePoint) -> None:
        self.epoch = point.epoch
        with (self.attempt / jobs.CURVE).open("a") as file:
            file.write(json.dumps(dataclasses.asdict(point)) + "\n")
        self.write()
        self.report({"epoch": point.epoch, "job": self.job.name})

    def on_samples(self, count: int) -> None:
        self.samples += count
        if time.monotonic() - self.written > 2:
            self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        storage.write_json(
            self.attempt / jobs.PROGRESS,
            {"samples": self.samples, "epoch": self.epoch, "time": time.time()},
        )

    def fence(self) -> None:
        """The job is another attempt's by now: leave its checkpoints alone."""
        if jobs.superseded(self.attempt):
            raise Interrupted

    def should_stop(self) -> bool:
        if not self.stopping and time.monotonic() - self.polled > _POLL_SECONDS:
            self.polled = time.monotonic()
            self.stopping = stop_requested(Path(self.job.out)) or jobs.superseded(self.attempt)
        return self.stopping


class _NotHere(Exception):
    """A file that a job needs is not on this node."""


def execute(job: Job, task: Task, report: Callable[[dict[str, Any]], None]) -> str:
    """Run an attempt of a job, or recognize that it is done already.

    Args:
        job: what to do.
        task: the sweep's task, its data loaded.
        report: gets small dictionaries as the job goes on.

    Returns:
        `COMPLETE` or `FAIL`, with the record committed; `PAUSED` at a rung; `STOPPED`;
        `SUPERSEDED` where the job was given to another process meanwhile; or `HALT` and why no
        job can run on this machine, such as a full disk.
    """
    try:
        return _attempt(job, task, report)
    except OSError as error:
        if not failures.is_the_machine(error, Path(job.out)):
            raise
        # Not the job's fault: it stays open, and the sweep ends until that is mended.
        place = error.filename or job.out
        return f"{HALT}{place}: {error.strerror}; mend that, the same command resumes"
    except _NotHere as error:
        return (
            f"{HALT}node {socket.gethostname()}: {error}; copy or mount it there, or take "
            "the node out; the same command resumes"
        )


def _attempt(job: Job, task: Task, report: Callable[[dict[str, Any]], None]) -> str:
    """One attempt; see `execute`.

    Raises:
        OSError: the machine is unfit; nothing is recorded of the job.
    """
    done = jobs.committed(job.folder) if job.kind != "test" else None
    if done is not None:
        return str(done["state"])
    config = parse_config(dict(job.config))
    limits = config.limits
    failures.judge(job.folder, job.run)
    gave_up = _give_up(job, limits.max_failures, limits.trial_minutes)
    if gave_up:
        failures.await_nodes(job.folder, job.run)
        gave_up = _give_up(job, limits.max_failures, limits.trial_minutes)
    threads, workers = _arithmetic(job, config), config.resources.processes
    basis = {"threads": threads, "workers": workers, "parent": job.parent}
    try:
        attempt = jobs.open_attempt(job, failures.own_node(), **basis)
    except jobs.Committed:
        return _attempt(job, task, report)
    if gave_up:
        failure = {**_failure(job, gave_up), "provenance": provenance(config)}
        return jobs.FAIL if jobs.commit(attempt, failure) else "SUPERSEDED"
    minutes = limits.trial_minutes if job.kind in ("trial", "baseline") else None
    reporter = _Reporter(job, attempt, report)
    torch.set_num_threads(threads)
    with captured(attempt / jobs.LOG), watchdog(attempt / jobs.HANG, minutes):
        try:
            if job.kind == "test":
                record: dict[str, Any] = _run_test(job, config, task, reporter)
            elif job.kind == jobs.SCORES:
                record = _run_scores(job, config, task, reporter)
            else:
                record = _run_training(job, config, task, reporter)
        except Paused as paused:
            metrics = {name: v for name, v in paused.metrics.items() if math.isfinite(v)}
            reporter.write()
            measured = {"metrics": metrics, "samples": paused.samples}
            jobs.note_rung(job.folder, job.rung, measured)
            storage.write_json(attempt / jobs.STOPPED, {"time": time.time()})
            return "PAUSED"
        except Interrupted:
            reporter.write()
            _clean_up(job)
            storage.write_json(attempt / jobs.STOPPED, {"time": time.time()})
            return "STOPPED"
        except MemberKilled:
            os._exit(1)  # it is the job's process that was killed, or a part of it
        except Exception as error:
            if failures.is_the_machine(error, Path(job.out)):
                raise failures.os_error(error) or error from None
            (attempt / jobs.TRACEBACK).write_text(traceback.format_exc())
            reason = " ".join(str(error).split()) or type(error).__name__
            if failures.is_missing_here(error, Path(job.out)):
                storage.write_json(attempt / jobs.STOPPED, {"time": time.time()})
                raise _NotHere(reason) from error
            if failures.is_gpu_memory(error):
                reporter.write()
                jobs.note_cause(attempt, failures.GPU_MEMORY, reason[:500])
                os._exit(1)  # with all that it holds there; the job goes on in another process
            record = _failure(job, f"{type(error).__name__}: {reason}"[:500])
    reporter.write()
    record["seconds"] = jobs.seconds_spent(job.folder)
    record["threads"], record["workers"] = threads, workers
    record["provenance"] = provenance(config)
    if not (is_mine := jobs.commit(attempt, record)):
        blobs.remove(attempt / MODEL_FILE)
        storage.write_json(attempt / jobs.STOPPED, {"time": time.time()})
    _clean_up(job)
    if record["state"] == jobs.FAIL and job.kind != "test" and failures.gpu_is_lost():
        os._exit(1)  # Tune would give the process to the next job; the record is there already
    return str(record["state"]) if is_mine else "SUPERSEDED"


def _arithmetic(job: Job, config: SweepConfig) -> int:
    """Threads of a job's next attempt: those of the checkpoint that it continues, if there is one.

    The same bits as without the interruption come of the same threads, workers and parent. Where
    workers or parent are others by now, the checkpoint is of no use and goes.
    """
    checkpoints, before = job.folder / "checkpoints", jobs.basis(job.folder)
    if not checkpoints.is_dir() or not before:
        return config.resources.cpus
    if (before["workers"], before["parent"]) == (config.resources.processes, job.parent):
        return int(before["threads"])
    remove_checkpoints(checkpoints)
    return config.resources.cpus


def _clean_up(job: Job) -> None:
    """Remove what a job has no use for once one of its attempts has a record."""
    if job.kind != "test" and jobs.committed(job.folder) is not None:
        remove_checkpoints(job.folder / "checkpoints")
        for spare in jobs.models(job.folder, spare=True):
            blobs.remove(spare)


def _give_up(job: Job, max_failures: int, minutes: float | None) -> str | None:
    """Why a job that failed before is not tried again, or None."""
    if jobs.hangs(job.folder) >= jobs.HANGS_ALLOWED:
        limit = "" if minutes is None else f" after {minutes:g} minutes"
        return f"hung: killed{limit}, twice (limits.trial_minutes)"
    causes = jobs.crashes(job.folder, job.run)
    if len(causes) < max_failures:
        return None
    fix = failures.FIXES.get(causes[-1])
    meaning = f": {fix}" if fix else ""
    return f"its process died {len(causes)} times (limits.max_failures){meaning}"


def _failure(job: Job, reason: str) -> dict[str, Any]:
    """A record of a job that will not be tried again."""
    return {
        "state": jobs.FAIL,
        "reason": reason,
        "ended": time.time(),
        "seed": job.seed,
        "attempts": len(jobs.attempts(job.folder)),
        "samples": jobs.samples_processed(job.folder),
        "seconds": jobs.seconds_spent(job.folder),
        "threads": 1,
    }


def _run_training(
    job: Job, config: SweepConfig, task: Task, reporter: _Reporter
) -> dict[str, Any]:
    spec = train_spec(config, job)
    device = training_device(config)
    hooks = Hooks(
        on_epoch=reporter.on_epoch,
        on_samples=reporter.on_samples,
        should_stop=reporter.should_stop,
        before_write=reporter.fence,
    )
    together = leading(
        task,
        spec,
        job.folder,
        size=config.resources.processes,
        threads=config.resources.cpus,
        gpu=device.type == "cuda",
        log=reporter.attempt,
    )
    with together as team:
        result = train(task, spec, job.folder, device, hooks, team, reporter.attempt)
    name = task.metric[0]
    if name not in result.metrics:
        raise UserError(f"evaluate() returned no '{name}'{nearest(name, result.metrics)}")
    if not math.isfinite(value := result.metrics[name]):
        raise ValueError(f"the validation {name} is {value}")
    record = _record(job, config, result)
    if spec.quant is not None:
        model = load_trained(task, spec, reporter.attempt / MODEL_FILE, device)
        graph = quant_state(model).graph
        record["layers"] = layer_rows(graph, hard_bits(model))
    return record


def _record(job: Job, config: SweepConfig, result: TrainResult) -> dict[str, Any]:
    return {
        "state": jobs.COMPLETE,
        "reason": None,
        "ended": time.time(),
        # A record is strict JSON, which has no NaN.
        "metrics": {name: v for name, v in result.metrics.items() if math.isfinite(v)},
        "cost": dict(result.cost),
        "bits": result.bits,
        "history": list(result.history),
        "samples": result.samples + sum(r["samples"] for r in jobs.rungs(job.folder)),
        "steps": result.steps,
        "model_sha256": result.model_sha256,
        "seed": job.seed,
        "params": dict(job.params),
        "budget": dict(job.budget),
        "parent": job.parent,
        "epochs_share": job.epochs_share,
        "attempts": len(jobs.attempts(job.folder)),
    }


def _run_scores(job: Job, config: SweepConfig, task: Task, reporter: _Reporter) -> dict[str, Any]:
    """Measure how much the loss grows with each tensor's bit-width; see `sensitivities`."""
    losses = score(
        task,
        train_spec(config, job),
        training_device(config),
        Hooks(on_samples=reporter.on_samples, should_stop=reporter.should_stop),
    )
    return {
        "state": jobs.COMPLETE,
        "reason": None,
        "ended": time.time(),
        "seed": job.seed,
        "losses": losses,
        "samples": jobs.samples_processed(job.folder),
    }


def _run_test(job: Job, config: SweepConfig, task: Task, reporter: _Reporter) -> dict[str, Any]:
    """Evaluate trained models on the test split; each result is written beside its model."""
    device = training_device(config)
    failed = []
    for entry in job.jobs:
        subject = Job(**entry)
        target = subject.folder / TEST_FILE
        if storage.read_sealed(target) is not None:
            continue
        try:
            spec = train_spec(config, subject)
            model = load_trained(task, spec, jobs.model_file(subject.folder), device)
            metrics = evaluate(task, model, "test")
        except Exception as error:
            if failures.is_no_job_s(error, Path(job.out)):
                raise
            traceback.print_exc()
            failed.append(f"{subject.name} ({' '.join(str(error).split())[:120]})")
            continue
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        storage.write_sealed(target, {"metrics": metrics})
        if reporter.should_stop():
            raise Interrupted
    if failed:
        raise RuntimeError(f"could not be evaluated on the test split: {', '.join(failed)}")
    return {"state": jobs.COMPLETE, "reason": None, "ended": time.time(), "seed": job.seed}
