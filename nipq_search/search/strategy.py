"""Strategies: which budget, and which starting point, the next trial gets.

To add one, write a class with `next_budget` and a line in `STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Strategy(Protocol):
    """Assigns budgets. It sees only what the ledger holds, so a resume changes nothing."""

    def next_budget(self, assigned: Sequence[int], budgets: int) -> int:
        """Index of the next trial's budget.

        Args:
            assigned: budget index of every trial so far that has not failed.
            budgets: number of budgets.
        """
        ...


class Independent:
    """Every trial starts from the float model; budgets take turns, least served first."""

    def next_budget(self, assigned: Sequence[int], budgets: int) -> int:
        """The budget with the fewest trials; the first of several."""
        counts = [0] * budgets
        for index in assigned:
            if 0 <= index < budgets:
                counts[index] += 1
        return counts.index(min(counts))


STRATEGIES: dict[str, type[Strategy]] = {"independent": Independent}
"""Strategies by the names that sweep files use."""
