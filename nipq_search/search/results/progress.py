"""The progress of a sweep, and the protocol of the objects that display it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Snapshot of a sweep's progress.

    Attributes:
        done: number of finished trials, including failed ones.
        running: number of running jobs.
        failed: number of failed trials.
        total: total number of trials.
        stage: current stage, such as `float model` or `trials`.
        best: validation metric and front cost of the best trial, by budget label.
        seconds_left: estimated remaining time in seconds; None if it is unknown.
        metric: name of the task's metric.
        front_cost: name of the front cost.
    """

    done: int = 0
    running: int = 0
    failed: int = 0
    total: int = 0
    stage: str = "trials"
    best: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seconds_left: float | None = None
    metric: str = ""
    front_cost: str = ""


class ProgressSink(Protocol):
    """Displays progress to the user."""

    def update(self, progress: Progress) -> None:
        """Display a snapshot; called about once a second."""
        ...

    def message(self, text: str) -> None:
        """Display a line permanently."""
        ...


class SilentProgress:
    """A `ProgressSink` that discards everything."""

    def update(self, progress: Progress) -> None:
        """Discard the snapshot."""

    def message(self, text: str) -> None:
        """Discard the line."""
