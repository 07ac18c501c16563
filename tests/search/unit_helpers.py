"""A tiny sweep for the tests of the search layer, without Ray and mostly without training."""

from __future__ import annotations

import copy
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nipq_search import file_io
from nipq_search.search import jobs
from nipq_search.search.backend.virtual import VirtualExecutor
from nipq_search.search.config.sweep_config import SweepConfig, parse_config
from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.coordinator.resolved import ResolvedSweep, resolve_sweep
from nipq_search.search.jobs import TEST_FILE, Job, JobOutcome, OutcomeKind
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.run import Outcome, open_ledger, run_sweep
from nipq_search.search.study.ledger import Ledger
from nipq_search.tasks.vision.digits import Digits
from nipq_search.train.models import MODEL_FILE

DOCUMENT: dict[str, Any] = {
    "name": "unit",
    "seed": 5,
    "task": "digits",
    "task_args": {"width": 4},
    "float": {"epochs": 0.2, "batch_size": 128},
    "quant": {"activations": {"bits": [1, 2, 4, 8]}},
    "budgets": [{"bops": "uniform 4"}, {"bops": "uniform 3"}],
    "train": {"epochs": 0.4, "batch_size": 128, "norm_batches": 1, "calibration_batches": 1},
    "search": {
        "strategy": "independent",
        "trials": 4,
        "sampler": "random",
        "baselines": [4],
        "space": {
            "lr": {"log": [0.01, 0.1]},
            "distill_weight": {"choice": [0, 0.5]},
        },
    },
}


def document(**changes: Any) -> dict[str, Any]:
    """Return the tiny sweep with changes (`section__key=value`)."""
    found = copy.deepcopy(DOCUMENT)
    for name, value in changes.items():
        *sections, key = name.split("__")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return found


def make_config(**changes: Any) -> SweepConfig:
    """Return the validated configuration of the tiny sweep."""
    return parse_config(document(**changes))


@functools.lru_cache(maxsize=1)
def digits() -> Digits:
    """Return the task of the tiny sweep; its data are read once."""
    task = Digits(width=4)
    task.load_data()
    return task


@functools.lru_cache(maxsize=8)
def _facts(text: str) -> ResolvedSweep:
    return resolve_sweep(parse_config(json.loads(text)), digits())


def facts_of(config: SweepConfig) -> ResolvedSweep:
    """Return the facts of a sweep on digits, computed once."""
    return _facts(json.dumps(config.as_json()))


def run_here(config: SweepConfig, out: Path, **options: Any) -> Outcome:
    """Run a whole sweep with real training in this process."""
    return run_sweep(config, out, executor=VirtualExecutor(), **options)


class Crash(BaseException):
    """Simulates the death of the driver."""


class Bench:
    """A sweep without Ray: jobs run one after another in this process.

    Args:
        out: the sweep's folder.
        config: the sweep.
    """

    def __init__(self, out: Path, config: SweepConfig) -> None:
        self.out, self.config = out, config
        self.executed: list[str] = []
        self.fail: Callable[[Job], str | None] = lambda job: None
        self.enough: Callable[[], bool] = lambda: False
        self.runs = 0

    def open(self) -> Coordinator:
        """Open the ledger and return a reconciled coordinator, as a new driver does."""
        self.out.mkdir(exist_ok=True)
        self.runs += 1
        self.ledger, self.facts = open_ledger(self.config, digits(), self.out)
        coordinator = Coordinator(
            config=self.config,
            resolved=self.facts,
            ledger=self.ledger,
            out=self.out,
            run=f"run-{self.runs}",
            limit_reached=self.enough,
        )
        coordinator.reconcile()
        return coordinator

    def sweep(self, execute: Callable[[Job], JobOutcome] | None = None) -> Coordinator:
        """Run the sweep to completion and return the coordinator."""
        coordinator = self.open()
        while isinstance(job := coordinator.next_job(), Job):
            (execute or self.execute)(job)
            coordinator.finished(job)
        return coordinator

    def execute(self, job: Job) -> JobOutcome:
        """Execute a job as a worker would, with invented figures."""
        if job.kind != "test" and (done := jobs.committed_record(job.folder)) is not None:
            return JobOutcome(kind=OutcomeKind(done["state"]))
        self.executed.append(job.name)
        attempt = jobs.open_attempt(job)
        progress = {"samples": 100, "epoch": 1, "time": time.time()}
        file_io.write_json(attempt / jobs.PROGRESS, progress)
        for entry in job.jobs:
            figures = {"metrics": {"accuracy": 0.5, "loss": 1.0}}
            file_io.write_sealed(Job(**entry).folder / TEST_FILE, figures)
        record = self.record(job)
        jobs.commit(attempt, record)
        return JobOutcome(kind=OutcomeKind(record["state"]))

    def record(self, job: Job) -> dict[str, Any]:
        """Return an invented record whose accuracy increases with the learning rate."""
        reason = self.fail(job)
        uniform = {name: costs["uniform8"] for name, costs in self.facts.costs.items()}
        cost = {**uniform, **{name: 0.98 * target for name, target in job.budget.items()}}
        accuracy = 0.9 if job.kind == "float" else 0.5 + float(job.params.get("lr", 0))
        record = {
            "state": jobs.COMPLETE if reason is None else jobs.FAIL,
            "reason": reason,
            "ended": time.time(),
            "seed": job.seed,
            "samples": 100,
            "seconds": 1.5,
            "attempts": len(jobs.attempts(job.folder)),
            "threads": 1,
        }
        if reason is None:
            model = job.name.encode()
            file_io.write_bytes(jobs.attempts(job.folder)[-1] / MODEL_FILE, model)
            record |= {
                "model_sha256": file_io.digest(model),
                "metrics": {"accuracy": accuracy, "loss": 1 - accuracy},
                "cost": cost,
                "params": dict(job.params),
                "budget": dict(job.budget),
                "layers": [{"name": "stem", "kind": "conv", "weight_bits": 4}],
            }
        return record

    def view(self) -> Sweep:
        """Return the sweep as read-only commands open it."""
        return Sweep.open(self.out)


def ledger_of(out: Path, config: SweepConfig) -> Ledger:
    """Return the ledger of a sweep that has been opened before."""
    return open_ledger(config, digits(), out)[0]
