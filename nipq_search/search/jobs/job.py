"""A job is one training: the float model's, a baseline's or a trial's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nipq_search.search.jobs.paths import job_folder

COMPLETE, FAIL = "COMPLETE", "FAIL"
SCORES = "sensitivity"
"""Kind of the job that measures how much the loss grows with each tensor's bit-width."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is asked to do; plain types only, for it travels.

    Attributes:
        kind: `float`, `sensitivity`, `baseline`, `trial` or `test`.
        number: trial number, bits of a baseline, else 0.
        out: the sweep's folder, absolute.
        config: the resolved sweep configuration.
        run: token of the driver's run.
        seed: of everything random in the training.
        params: hyperparameters of a trial.
        budget: absolute targets of a trial.
        parent: number of the trial that a trial starts from, or None.
        epochs_share: share of `train.epochs` that a trial trains.
        rung: number of the rung at which a trial pauses next.
        jobs: folders whose models a `test` job evaluates.
    """

    kind: str
    number: int
    out: str
    config: Mapping[str, Any]
    run: str
    seed: int
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    budget: Mapping[str, float] = dataclasses.field(default_factory=dict)
    parent: int | None = None
    epochs_share: float = 1.0
    rung: int = 0
    jobs: tuple[Mapping[str, Any], ...] = ()

    @property
    def folder(self) -> Path:
        """The job's own folder."""
        return job_folder(Path(self.out), self.kind, self.number)

    @property
    def name(self) -> str:
        """A readable name."""
        if self.kind == "trial":
            return f"trial-{self.number:03d}"
        return f"lsq-{self.number}" if self.kind == "baseline" else self.kind

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return dataclasses.asdict(self)
