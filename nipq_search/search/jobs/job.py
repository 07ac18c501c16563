"""A job: one training run or evaluation in a worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nipq_search.search.jobs.paths import job_folder

COMPLETE, FAIL = "COMPLETE", "FAIL"
"""Values of `state` in a result record."""

SCORES = "sensitivity"
"""Kind of the job that measures how much the loss grows as each tensor's bit-width shrinks."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Description of a job, in plain types that can be sent to a worker.

    Attributes:
        kind: `float`, `sensitivity`, `baseline`, `trial` or `test`.
        number: trial number; bit-width of a baseline; otherwise 0.
        out: absolute path of the sweep's folder.
        config: the sweep configuration, in the form of `SweepConfig.as_json`.
        run: token of the driver's run.
        seed: seed of all randomness in the training run.
        params: hyperparameters of a trial and, with `search.bits`, its starting bit-widths.
        budget: absolute targets of a trial, by cost name.
        parent: number of the trial whose model a trial starts from; None for the float model.
        epochs_share: fraction of `train.epochs` for which a trial trains.
        rung: number of the rung at which a trial pauses next.
        jobs: jobs whose models a `test` job evaluates, each as `as_json` returns it.
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
        """The job's folder, which is inside the sweep's folder."""
        return job_folder(Path(self.out), self.kind, self.number)

    @property
    def name(self) -> str:
        """A readable name, such as `trial-003` or `lsq-4`."""
        if self.kind == "trial":
            return f"trial-{self.number:03d}"
        return f"lsq-{self.number}" if self.kind == "baseline" else self.kind

    def as_json(self) -> dict[str, Any]:
        """Return the job as plain types; `Job(**...)` restores it."""
        return dataclasses.asdict(self)
