"""What each kind of job does: train, measure sensitivity, or evaluate models on the test split."""

from __future__ import annotations

import math
import time
import traceback
from pathlib import Path
from typing import Any

from nipq_search import file_io
from nipq_search.cost import layer_rows
from nipq_search.cost.base import hard_bits
from nipq_search.errors import UserError, nearest
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.search import jobs
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.jobs import TEST_FILE, Job
from nipq_search.search.worker import failures
from nipq_search.search.worker.process_group import launch_group
from nipq_search.search.worker.reporter import Reporter
from nipq_search.search.worker.train_spec import train_spec, training_device
from nipq_search.tasks import Task
from nipq_search.tasks.base import evaluate
from nipq_search.train import Hooks, Interrupted, TrainResult, train
from nipq_search.train.models import MODEL_FILE, load_trained
from nipq_search.train.sensitivity import score


def run_job(job: Job, config: SweepConfig, task: Task, reporter: Reporter) -> dict[str, Any]:
    """Train, measure sensitivity scores or evaluate on the test split, as the job's kind requires.

    Args:
        job: the job.
        config: the sweep configuration.
        task: the sweep's task, with its data loaded.
        reporter: records the progress and checks for requests to stop.

    Returns:
        The job's result record, to which the caller adds its setup, provenance and duration.

    Raises:
        Interrupted: a stop was requested, or a later attempt has taken over the job.
        Paused: a trial reached its rung.
        RankKilled: another process of the training run was killed.
        Exception: the job failed for any other reason.
    """
    if job.kind == "test":
        return _run_test(job, config, task, reporter)
    if job.kind == jobs.SCORES:
        return _run_scores(job, config, task, reporter)
    return _run_training(job, config, task, reporter)


def failure_record(job: Job, reason: str) -> dict[str, Any]:
    """Return the record of a job that failed and will not be retried."""
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


def _run_training(job: Job, config: SweepConfig, task: Task, reporter: Reporter) -> dict[str, Any]:
    """Train a float model, baseline or trial, and return its record."""
    spec = train_spec(config, job)
    device = training_device(config)
    hooks = Hooks(
        on_epoch=reporter.on_epoch,
        on_samples=reporter.on_samples,
        should_stop=reporter.should_stop,
        before_write=reporter.before_write,
    )
    group = launch_group(
        task,
        spec,
        job.folder,
        size=config.resources.processes,
        threads=config.resources.cpus,
        gpu=device.type == "cuda",
        log=reporter.attempt,
    )
    with group as team:
        result = train(task, spec, job.folder, device, hooks, team, reporter.attempt)
    name = task.metric[0]
    if name not in result.metrics:
        raise UserError(f"evaluate() returned no '{name}'{nearest(name, result.metrics)}")
    if not math.isfinite(value := result.metrics[name]):
        raise ValueError(f"the validation {name} is {value}")
    record = _record(job, result)
    if spec.quant is not None:
        model = load_trained(task, spec, reporter.attempt / MODEL_FILE, device)
        graph = quant_state(model).graph
        record["layers"] = layer_rows(graph, hard_bits(model))
    return record


def _record(job: Job, result: TrainResult) -> dict[str, Any]:
    """Return the record of a training run that succeeded."""
    return {
        "state": jobs.COMPLETE,
        "reason": None,
        "ended": time.time(),
        # Records are strict JSON, which has no NaN.
        "metrics": {name: v for name, v in result.metrics.items() if math.isfinite(v)},
        "cost": dict(result.cost),
        "bits": result.bits,
        "history": list(result.history),
        "samples": result.samples + sum(r["samples"] for r in jobs.rung_records(job.folder)),
        "steps": result.steps,
        "model_sha256": result.model_sha256,
        "seed": job.seed,
        "params": dict(job.params),
        "budget": dict(job.budget),
        "parent": job.parent,
        "epochs_share": job.epochs_share,
        "attempts": len(jobs.attempts(job.folder)),
    }


def _run_scores(job: Job, config: SweepConfig, task: Task, reporter: Reporter) -> dict[str, Any]:
    """Measure the sensitivity scores, and return the record that contains them; see `score`."""
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


def _run_test(job: Job, config: SweepConfig, task: Task, reporter: Reporter) -> dict[str, Any]:
    """Evaluate trained models on the test split and write each result to its job's folder.

    Models that have a result are skipped. If a model cannot be evaluated, the others still are.
    """
    device = training_device(config)
    failed = []
    for entry in job.jobs:
        subject = Job(**entry)
        target = subject.folder / TEST_FILE
        if file_io.read_sealed(target) is not None:
            continue
        try:
            spec = train_spec(config, subject)
            model = load_trained(task, spec, jobs.model_file(subject.folder), device)
            metrics = evaluate(task, model, "test")
        except Exception as error:
            if failures.is_environment_fault(error, Path(job.out)):
                raise
            traceback.print_exc()
            failed.append(f"{subject.name} ({' '.join(str(error).split())[:120]})")
            continue
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        file_io.write_sealed(target, {"metrics": metrics})
        if reporter.should_stop():
            raise Interrupted
    if failed:
        raise RuntimeError(f"could not be evaluated on the test split: {', '.join(failed)}")
    return {"state": jobs.COMPLETE, "reason": None, "ended": time.time(), "seed": job.seed}
