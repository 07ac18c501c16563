"""`replay`: reruns a trial from its record and compares the results."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nipq_search import blobs
from nipq_search.errors import UserError
from nipq_search.records import SCHEMA
from nipq_search.search import jobs
from nipq_search.search.checks.preflight import load_task
from nipq_search.search.config.sweep_config import SweepConfig, parse_config
from nipq_search.search.jobs import Job, committed_record, job_folder, model_file
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.worker.process_group import launch_group
from nipq_search.search.worker.provenance import provenance, provenance_changes
from nipq_search.search.worker.train_spec import train_spec, training_device
from nipq_search.tasks import Task
from nipq_search.train import Hooks, train
from nipq_search.train.checkpoint import from_bytes
from nipq_search.train.models import MODEL_FILE

COMPARED = ("model_sha256", "metrics", "cost", "bits", "steps")
"""Entries of a record that a replay must reproduce."""

WEIGHTS_TOLERANCE = 1e-3
"""Allowed relative error of a tensor, in the Euclidean norm, if results may differ in rounding."""

METRICS_TOLERANCE = 1e-2
"""Allowed relative error of a metric, if results may differ in rounding."""

_NO_PAUSE = 1 << 30
"""A rung that no trial reaches, so that the replay trains without pausing."""


def replay(
    sweep: Sweep, trial: int, report: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Rerun a finished trial from its record and compare the results.

    The record determines the hyperparameters, the budget, the parent, the seed and the number of
    threads. The results must be bit-identical if this machine matches the record's provenance
    (versions and CPU capability). Otherwise, and for records without provenance, models and
    metrics are compared within `WEIGHTS_TOLERANCE` and `METRICS_TOLERANCE`. The sweep's folder is
    not modified.

    Args:
        sweep: the sweep.
        trial: number of a COMPLETE trial.
        report: called with a line after every epoch, and with one line if a tolerance applies.

    Returns:
        The document that `replay --json` prints: `equal` is true if the results agree;
        `differences` lists the name, recorded value and replayed value of each entry that differs.

    Raises:
        UserError: the trial is not COMPLETE, or its record or a model that it started from is
            missing.
    """
    record = _record(sweep, trial)
    config = parse_config(dict(sweep.config))
    job = _job(sweep, trial, record)
    _check_start(job)
    task = load_task(config)
    recorded, here = record.get("provenance"), provenance(config)
    exact = recorded == here
    if not exact:
        report(f"compared within a tolerance: {_why_inexact(recorded, here)}")
    replayed, weights = _train_again(config, job, record, task, report)
    differences = [
        {"name": name, "recorded": record[name], "replayed": replayed[name]}
        for name in COMPARED
        if record[name] != replayed[name]
    ]
    recorded_weights = None
    if not exact:
        recorded_weights = _weights(model_file(job.folder))
        differences = _beyond_tolerance(differences, recorded_weights, weights)
    same_model = record["model_sha256"] == replayed["model_sha256"]
    tolerance = {"weights": WEIGHTS_TOLERANCE, "metrics": METRICS_TOLERANCE}
    return {
        "schema": SCHEMA,
        "trial": trial,
        "equal": not differences,
        "exact": exact,
        "tolerance": None if exact else tolerance,
        "weights_compared": exact or same_model or recorded_weights is not None,
        "provenance": {"recorded": recorded, "here": here},
        "model_sha256": replayed["model_sha256"],
        "differences": differences,
    }


def _train_again(
    config: SweepConfig,
    job: Job,
    record: Mapping[str, Any],
    task: Task,
    report: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train a trial again in a temporary folder.

    Args:
        config: the sweep configuration.
        job: the trial's job.
        record: the trial's record, which determines the number of threads and processes.
        task: the sweep's task, with its data loaded.
        report: called with a line after every epoch.

    Returns:
        The results, with the same types as in a record, and the tensors of the model.
    """
    threads, device = int(record["threads"]), training_device(config)
    torch.set_num_threads(threads)
    together: dict[str, Any] = {"size": record.get("workers", 1), "threads": threads}
    hooks = Hooks(on_epoch=lambda point: report(f"epoch {point.epoch}, {point.phase} phase"))
    with tempfile.TemporaryDirectory(prefix="nipq-replay-") as folder:
        place = Path(folder)
        spec = dataclasses.replace(train_spec(config, job), home=None)
        with launch_group(
            task, spec, place, **together, gpu=device.type == "cuda", log=place
        ) as team:
            result = train(task, spec, place, device, hooks, team)
        weights = _weights(place / MODEL_FILE) or {}
    # Records have passed through JSON and contain only finite metrics, so do the same here.
    found = {name: getattr(result, name) for name in COMPARED}
    found["metrics"] = {k: v for k, v in result.metrics.items() if math.isfinite(v)}
    replayed: dict[str, Any] = json.loads(json.dumps(found))
    return replayed, weights


def _record(sweep: Sweep, trial: int) -> dict[str, Any]:
    """Return the record of a COMPLETE trial; raise `UserError` if there is none."""
    state = sweep.record(trial).state
    record = committed_record(job_folder(sweep.folder, "trial", trial))
    if state == jobs.COMPLETE and record is None:
        place = job_folder(sweep.folder, "trial", trial)
        raise UserError(f"trial {trial}: its record is missing from {place}; restore the folder")
    if record is None or record["state"] != jobs.COMPLETE:
        raise UserError(
            f"trial {trial}: its state is {state}; only COMPLETE trials can be replayed"
        )
    return record


def _why_inexact(recorded: Mapping[str, Any] | None, here: Mapping[str, Any]) -> str:
    """Describe why a replay need not be bit-identical to the recorded trial."""
    if recorded is None:
        return "recorded without version information"
    return f"recorded with {'; '.join(provenance_changes(recorded, here))}"


def _weights(file: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a trained model; None if its file was deleted."""
    if not blobs.can_be_read(file):
        return None
    state = from_bytes(blobs.read(file))["model"]
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _beyond_tolerance(
    differences: list[dict[str, Any]],
    recorded: Mapping[str, Tensor] | None,
    replayed: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """Return the differences that exceed the tolerances.

    Args:
        differences: entries whose values differ.
        recorded: tensors of the recorded model; None if its file was deleted, in which case
            the models are not compared.
        replayed: tensors of the replayed model.

    Returns:
        The entries that exceed a tolerance, or that have none and differ. The model's entry names
        the tensor with the largest relative error.
    """
    found = []
    for entry in differences:
        if entry["name"] == "model_sha256":
            error, tensor = _largest_error(recorded, replayed) if recorded else (0.0, "")
            if error > WEIGHTS_TOLERANCE:
                found.append({**entry, "tensor": tensor, "relative_error": error})
        elif entry["name"] != "metrics" or not _close(entry["recorded"], entry["replayed"]):
            found.append(entry)
    return found


def _largest_error(
    recorded: Mapping[str, Tensor], replayed: Mapping[str, Tensor]
) -> tuple[float, str]:
    """Return the largest relative error of a tensor, in the Euclidean norm, and the tensor's name.

    The first tensor that is missing or has a different shape is returned with an error of 1. The
    error of a tensor that is not finite is also 1.
    """
    errors = {}
    for name in [*recorded, *(name for name in replayed if name not in recorded)]:
        expected, actual = recorded.get(name), replayed.get(name)
        if expected is None or actual is None or expected.shape != actual.shape:
            return 1.0, name
        expected, actual = expected.double(), actual.double()
        error = float((actual - expected).norm()) / (float(expected.norm()) or 1.0)
        errors[name] = error if math.isfinite(error) else 1.0
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def _close(recorded: Mapping[str, float], replayed: Mapping[str, float]) -> bool:
    """Return whether two sets of metrics agree within `METRICS_TOLERANCE`."""
    return recorded.keys() == replayed.keys() and all(
        math.isclose(value, replayed[name], rel_tol=METRICS_TOLERANCE, abs_tol=1e-9)
        for name, value in recorded.items()
    )


def _job(sweep: Sweep, trial: int, record: Mapping[str, Any]) -> Job:
    """Rebuild a trial's job from its record, without pauses at rungs."""
    return Job(
        kind="trial",
        number=trial,
        out=str(sweep.folder),
        config=sweep.config,
        run="",
        seed=record["seed"],
        params=record["params"],
        budget=record["budget"],
        parent=record["parent"],
        epochs_share=record.get("epochs_share", 1.0),
        rung=_NO_PAUSE,
    )


def _check_start(job: Job) -> None:
    """Raise `UserError` if a model that the trial started from is missing."""
    wanted = [("float", 0)] + ([] if job.parent is None else [("trial", job.parent)])
    for kind, number in wanted:
        file = model_file(job_folder(Path(job.out), kind, number))
        if not blobs.can_be_read(file):
            raise UserError(f"{file}: missing, but the trial started from this model; restore it")
