"""How far a sweep is, and where to say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A moment of a sweep.

    Attributes:
        done: finished trials, failed ones included.
        running: jobs that run now.
        failed: failed trials.
        total: trials in all.
        stage: what goes on, in words.
        best: by budget label, the best validation metric and its front cost.
        seconds_left: estimate of the time left, or None.
        metric: name of the metric.
        front_cost: name of the cost.
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
    """Shows progress to a person."""

    def update(self, progress: Progress) -> None:
        """Called about once a second; may redraw."""
        ...

    def message(self, text: str) -> None:
        """Show a line that stays."""
        ...


class Silent:
    """Shows nothing."""

    def update(self, progress: Progress) -> None:
        """Ignore it."""

    def message(self, text: str) -> None:
        """Ignore it."""
