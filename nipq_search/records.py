"""Record types that cross layers: what a trial was asked to do and what it did.

Plain frozen dataclasses without dependencies. The search writes them, the tracking and report
layers read them, and every one of them survives a round trip through JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

SCHEMA = 1
"""Version of every JSON document that the commands print."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One epoch of one job: its number, its phase and what was measured.

    Attributes:
        epoch: epochs finished when this was measured, counted from 1.
        step: optimizer steps taken so far.
        phase: `noise`, `tuning` or `float`.
        timestamp: Unix time in seconds at which the worker wrote the point.
        metrics: scalars such as `train_loss`, `validation_accuracy`, `bops_estimate`.
    """

    epoch: int
    step: int
    phase: str
    timestamp: float
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial as people see it: a row of `results.parquet`, a run in MLflow.

    Attributes:
        trial: the Optuna trial number, the trial's only identity everywhere.
        state: `COMPLETE`, `PRUNED`, `FAIL`, `RUNNING` or `WAITING`.
        reason: one line that says why a trial failed, else None.
        budget_label: the budget as the user wrote it, for example `bops: uniform 4`.
        budget: absolute targets by cost name, for example `{"bops": 5.3e9}`.
        params: hyperparameters of the trial.
        validation: the task's metric on the validation split.
        test: the same on the test split; only trials on the front ever have it.
        metrics: every validation figure that the task returned.
        cost: exact costs by name (`bops`, `weight_bytes`, ...).
        on_front: whether no other COMPLETE trial is at least as good and as cheap.
        samples: training samples that the trial processed itself.
        seconds: wall time of training, summed over the attempts that led to the result.
        parent: trial whose model this one started from, or None for the float model.
        attempts: how often the trial was started.
        seed: seed of the trial, derived from (sweep seed, trial number).
        threads: torch threads that the trial used.
        started: Unix time of the first attempt, or None while it waits.
        ended: Unix time of the result, or None.
        strategy: name of the strategy that assigned the budget.
        folder: folder of the last attempt below the sweep's folder.
    """

    trial: int
    state: str
    reason: str | None = None
    budget_label: str = ""
    budget: Mapping[str, float] = dataclasses.field(default_factory=dict)
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    validation: float | None = None
    test: float | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cost: Mapping[str, float] = dataclasses.field(default_factory=dict)
    on_front: bool = False
    samples: int = 0
    seconds: float = 0.0
    parent: int | None = None
    attempts: int = 0
    seed: int = 0
    threads: int = 1
    started: float | None = None
    ended: float | None = None
    strategy: str = ""
    folder: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """A uniform LSQ model trained beside the search, drawn into the report for comparison."""

    bits: int
    validation: float | None
    test: float | None
    cost: Mapping[str, float]
    samples: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """What is known of a whole sweep apart from its trials.

    Attributes:
        name: the sweep's name.
        config: the resolved configuration, as plain JSON types.
        task: the task's name as the configuration spells it.
        dataset: name, sizes of the splits and a digest of the data, as plain JSON types.
        metric: name of the task's metric, and `mode` (`max` or `min`).
        front: the document that `front --json` prints.
    """

    name: str
    config: Mapping[str, Any]
    task: str
    dataset: Mapping[str, Any]
    metric: str
    mode: str
    front: Mapping[str, Any]
    baselines: tuple[Baseline, ...] = ()
