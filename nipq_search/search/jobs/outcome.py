"""The outcome of one attempt, as a worker returns it and an executor receives it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class OutcomeKind(enum.Enum):
    """Outcome of an attempt of a job."""

    COMPLETE = "COMPLETE"
    """The job succeeded; its result record is committed."""

    FAIL = "FAIL"
    """The job failed for good; its result record is committed."""

    PAUSED = "PAUSED"
    """The trial reached its rung and recorded its metrics; the job stays open."""

    STOPPED = "STOPPED"
    """The attempt received a stop request and saved its state; the job stays open."""

    SUPERSEDED = "SUPERSEDED"
    """A later attempt took the job over; this one committed nothing."""

    HALT = "HALT"
    """The machine cannot run any job; the job stays open, and the sweep must end."""


@dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """How an attempt ended, with the reason if it ends the sweep.

    Attributes:
        kind: how the attempt ended.
        reason: why the machine is unfit and how to fix it; empty unless `kind` is `HALT`.
    """

    kind: OutcomeKind
    reason: str = ""

    @property
    def has_record(self) -> bool:
        """Whether the job has a committed result record."""
        return self.kind in (OutcomeKind.COMPLETE, OutcomeKind.FAIL)

    def as_report(self) -> dict[str, str]:
        """Return the outcome as plain types that can be sent to another process."""
        return {"state": self.kind.value, "reason": self.reason}

    @classmethod
    def from_report(cls, report: Mapping[str, Any] | None) -> JobOutcome | None:
        """Restore an outcome from what `as_report` returned, or return None if there is none."""
        if not report or "state" not in report:
            return None
        return cls(kind=OutcomeKind(report["state"]), reason=str(report.get("reason", "")))
