"""A strategy that cycles through the budgets and starts every trial from the float model."""

from __future__ import annotations

from nipq_search.search.strategies.strategies import Assignment, Strategy


class RoundRobin(Strategy):
    """Assigns the budgets in turn, regardless of the results of earlier trials."""

    def assign(self, state):
        """Return the next budget in turn."""
        return Assignment(budget=len(state.assigned) % len(state.budgets))
