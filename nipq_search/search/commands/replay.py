"""`replay`: rerun a trial from its record and compare the results bit by bit."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nipq_search import blobs
from nipq_search.errors import UserError
from nipq_search.records import SCHEMA
from nipq_search.search import jobs
from nipq_search.search.checks.preflight import load_task
from nipq_search.search.config.sweep_config import parse_config
from nipq_search.search.jobs import Job, committed, job_folder, model_file
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.worker.process_group import launch_group
from nipq_search.search.worker.train_spec import train_spec, training_device
from nipq_search.train import Hooks, train

COMPARED = ("model_sha256", "metrics", "cost", "bits", "steps")
"""Entries of a record that a replay must reproduce exactly."""

_NO_PAUSE = 1 << 30
"""A rung that no trial reaches, so that the replay trains without pausing."""


def replay(
    sweep: Sweep, trial: int, report: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Rerun a finished trial with the params, budget, parent, seed and threads of its record.

    The sweep's folder is not modified.

    Args:
        sweep: the sweep.
        trial: number of a COMPLETE trial.
        report: receives a line after every epoch.

    Returns:
        The document of `replay --json`: `equal` is true if all compared entries match;
        `differences` lists the name, recorded and replayed value of each entry that differs.

    Raises:
        UserError: the trial has no record, or a model that it started from is missing.
    """
    state = sweep.record(trial).state
    record = committed(job_folder(sweep.folder, "trial", trial))
    if state == jobs.COMPLETE and record is None:
        place = job_folder(sweep.folder, "trial", trial)
        raise UserError(f"trial {trial}: its record is missing from {place}; restore the folder")
    if record is None or record["state"] != jobs.COMPLETE:
        raise UserError(
            f"trial {trial}: its state is {state}; only COMPLETE trials can be replayed"
        )
    config = parse_config(dict(sweep.config))
    job = _job(sweep, trial, record)
    _check_start(job)
    task = load_task(config)
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
    # Normalize like a record: converted through JSON, without non-finite metrics.
    found = {name: getattr(result, name) for name in COMPARED}
    found["metrics"] = {k: v for k, v in result.metrics.items() if math.isfinite(v)}
    replayed = json.loads(json.dumps(found))
    differences = [
        {"name": name, "recorded": record[name], "replayed": replayed[name]}
        for name in COMPARED
        if record[name] != replayed[name]
    ]
    return {
        "schema": SCHEMA,
        "trial": trial,
        "equal": not differences,
        "model_sha256": result.model_sha256,
        "differences": differences,
    }


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
