"""Strategies: which budget, and which starting point, the next trial gets.

To add one, write a class with the members of `Strategy` and a line in `STRATEGIES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A COMPLETE trial: its number, its exact costs, and its metric, the greater the better."""

    number: int
    cost: Mapping[str, float]
    metric: float


class Strategy(Protocol):
    """Assigns budgets and parents. It sees the ledger alone, so a resume changes nothing.

    Attributes:
        epochs_share: share of `train.epochs` that a trial with a parent trains.
    """

    epochs_share: float

    def next_budget(self, assigned: Sequence[int], budgets: int) -> int:
        """Index of the next trial's budget.

        Args:
            assigned: budget index of every trial so far that has not failed.
            budgets: number of budgets.
        """
        ...

    def parent(self, budget: Mapping[str, float], finished: Sequence[Finished]) -> int | None:
        """Number of the trial that a new one starts from; None for the float model.

        Args:
            budget: absolute targets of the new trial.
            finished: every COMPLETE trial at this moment.
        """
        ...


class Independent:
    """Every trial starts from the float model; budgets take turns, least served first."""

    epochs_share = 1.0

    def next_budget(self, assigned: Sequence[int], budgets: int) -> int:
        """The budget with the fewest trials; the first of several."""
        counts = [0] * budgets
        for index in assigned:
            if 0 <= index < budgets:
                counts[index] += 1
        return counts.index(min(counts))

    def parent(self, budget: Mapping[str, float], finished: Sequence[Finished]) -> int | None:
        """Always the float model."""
        return None


class Ladder:
    """A trial starts from the nearest finished one at an equal or larger budget, and is shorter.

    It waits for nothing: it takes what is finished when it is asked for.
    """

    epochs_share = 1 / 3
    _AS_LARGE = 0.97
    _STEP = 0.1

    def __init__(self) -> None:
        """Budgets take turns as in `Independent`."""
        self._turns = Independent()

    def next_budget(self, assigned: Sequence[int], budgets: int) -> int:
        """The budget with the fewest trials; the first of several."""
        return self._turns.next_budget(assigned, budgets)

    def parent(self, budget: Mapping[str, float], finished: Sequence[Finished]) -> int | None:
        """The best of the nearest: costs within a tenth of an octave count as equally near."""
        best: tuple[int, float, int] | None = None
        for trial in finished:
            ratios = [trial.cost[name] / target for name, target in budget.items()]
            if min(ratios) < self._AS_LARGE:
                continue
            distance = round(math.log2(max(ratios)) / self._STEP)
            key = (distance, -trial.metric, trial.number)
            if best is None or key < best:
                best = key
        return None if best is None else best[2]


STRATEGIES: dict[str, type[Strategy]] = {"independent": Independent, "ladder": Ladder}
"""Strategies by the names that sweep files use."""
