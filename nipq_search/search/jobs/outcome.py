"""The outcome of an attempt, which a worker returns and an executor receives."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class OutcomeKind(enum.Enum):
    """The ways in which an attempt of a job can end."""

    COMPLETE = "COMPLETE"
    """The job succeeded; its result record is committed."""

    FAIL = "FAIL"
    """The job failed for good; its result record is committed."""

    PAUSED = "PAUSED"
    """The trial reached its rung and recorded its metrics; the job stays open."""

    STOPPED = "STOPPED"
    """The attempt stopped early, usually because of a stop request; the job stays open."""

    SUPERSEDED = "SUPERSEDED"
    """A later attempt took the job over, so the result of this one was not committed."""

    HALT = "HALT"
    """The machine has a fault or lacks a file; the job stays open, and the sweep must end."""


@dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """How an attempt ended, with the reason if it ends the sweep.

    Attributes:
        kind: how the attempt ended.
        reason: the fault of the machine and how to fix it; empty unless `kind` is `HALT`.
    """

    kind: OutcomeKind
    reason: str = ""

    @property
    def has_record(self) -> bool:
        """Whether this outcome implies that the job has a committed result record."""
        return self.kind in (OutcomeKind.COMPLETE, OutcomeKind.FAIL)

    def as_report(self) -> dict[str, str]:
        """Return the outcome as plain types that can be sent to another process."""
        return {"state": self.kind.value, "reason": self.reason}

    @classmethod
    def from_report(cls, report: Mapping[str, Any] | None) -> JobOutcome | None:
        """Restore an outcome from what `as_report` returned; None if `report` contains none."""
        if not report or "state" not in report:
            return None
        return cls(kind=OutcomeKind(report["state"]), reason=str(report.get("reason", "")))
