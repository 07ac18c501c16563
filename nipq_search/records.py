"""Record types shared by several layers: the inputs and results of trials and sweeps.

These frozen dataclasses depend on no other part of the library and survive a round trip through
JSON. `search/results/documents.py` creates them; the tracking and report layers read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

SCHEMA = 1
"""Schema version of all JSON documents that the commands print."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Metrics of one epoch of a job.

    Attributes:
        epoch: number of finished epochs.
        step: number of optimizer steps taken so far.
        phase: `noise`, `tuning` or `float`.
        timestamp: Unix time of the measurement, in seconds.
        metrics: scalars such as `train_loss`, `validation_accuracy`, `bops_estimate`.
    """

    epoch: int
    step: int
    phase: str
    timestamp: float
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial: a row of `results.parquet` and a run in MLflow.

    Attributes:
        trial: Optuna trial number, which identifies the trial everywhere.
        state: `COMPLETE`, `PRUNED`, `FAIL`, `RUNNING` or `WAITING`.
        reason: one-line reason for a failure, or None.
        budget_label: the budget as written in the sweep file, for example `bops: uniform 4`.
        budget: absolute targets by cost name, for example `{"bops": 5.3e9}`.
        params: hyperparameters of the trial.
        validation: the task's metric on the validation split.
        test: the task's metric on the test split, which is measured only for trials on the front;
            None if it was not measured.
        metrics: all validation metrics that the task returned.
        cost: exact costs by name (`bops`, `weight_bytes`, ...).
        on_front: whether no other COMPLETE trial dominates this one in validation metric and front
            cost.
        samples: number of training samples that the trial processed, excluding its parent's.
        seconds: wall-clock time of training, summed over all attempts.
        parent: number of the trial from whose model this one started; None if it started from the
            float model.
        attempts: number of times the trial was started.
        seed: seed of the trial, derived from the sweep's seed and the trial number.
        threads: number of torch threads of each training process.
        started: Unix time at the start of the first attempt, in seconds; None until then.
        ended: Unix time of the result, in seconds; None until then.
        strategy: name of the strategy that assigned the budget.
        folder: folder of the last attempt, relative to the sweep's folder.
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
    """A uniform LSQ model, trained for comparison with the search.

    Attributes:
        bits: bit-width of all searched tensors.
        validation: the task's metric on the validation split.
        test: the task's metric on the test split.
        cost: exact costs by name.
        samples: number of training samples processed.
        seconds: wall-clock time of training.
    """

    bits: int
    validation: float | None
    test: float | None
    cost: Mapping[str, float]
    samples: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A sweep's properties, excluding the records of its trials.

    Attributes:
        name: the sweep's name.
        config: the resolved configuration, as plain JSON types.
        task: the task's name in the configuration.
        dataset: name, split sizes and digest of the data, as plain JSON types.
        metric: name of the task's metric.
        mode: `max` or `min`, the direction in which the metric improves.
        front: the document that `front --json` prints.
        baselines: uniform models for comparison.
    """

    name: str
    config: Mapping[str, Any]
    task: str
    dataset: Mapping[str, Any]
    metric: str
    mode: str
    front: Mapping[str, Any]
    baselines: tuple[Baseline, ...] = ()
