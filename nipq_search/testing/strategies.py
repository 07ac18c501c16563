"""Conformance suite for strategies."""

from __future__ import annotations

from typing import ClassVar

import pytest

from nipq_search.search.strategies.expected_gain import Axes
from nipq_search.search.strategies.strategies import FinishedTrial, SearchState, Strategy

BUDGETS = ({"bops": 400.0}, {"bops": 200.0}, {"bops": 100.0}, {"bops": 80.0}, {"bops": 70.0})
AXES = Axes(cost="bops", least=60.0, most=1600.0, reference=0.7, best=0.9)


class StrategyConformance:
    """Properties of every strategy.

    Attributes:
        strategy: the class under test.
    """

    strategy: ClassVar[type[Strategy]]

    @pytest.mark.parametrize("budgets", [1, 2, 5])
    def test_strategies_serve_every_budget(self, budgets: int) -> None:
        """Every budget is assigned, targets and parents are valid, and the strategy is stateless.

        Each assignment must equal that of a new instance of the strategy.
        """
        strategy = self.strategy()
        assigned: list[int] = []
        finished: list[FinishedTrial] = []
        served = []
        for number in range(3 * budgets):
            state = SearchState(
                budgets=BUDGETS[:budgets],
                assigned=list(assigned),
                finished=list(finished),
                axes=AXES,
            )
            target = strategy.assign(state)
            assert target == self.strategy().assign(state), "the strategy has hidden state"
            assert 0 <= target.budget < budgets
            targets = dict(target.targets or BUDGETS[target.budget])
            assert AXES.least <= targets["bops"] <= AXES.most
            parent = strategy.parent(targets, finished)
            assert parent is None or parent in {trial.number for trial in finished}
            start = None if parent is None else finished[parent]
            assert 0 < strategy.epochs_share(targets, start) <= 1
            assigned.append(target.budget)
            served.append(targets)
            metric = 0.9 - 5.0 / targets["bops"]
            finished.append(FinishedTrial(number=number, cost=targets, metric=metric))
        assert set(assigned) == set(range(budgets))
        assert all(budget in served for budget in BUDGETS[:budgets])

    def test_settings_are_in_range(self) -> None:
        """The noise settings are valid, and the rungs increase strictly between 0 and 1."""
        assert 0 <= self.strategy.noise_factor <= 1
        assert self.strategy.least_noise_steps >= 0
        rungs = self.strategy.rungs
        assert all(0 < rung < 1 for rung in rungs) and list(rungs) == sorted(set(rungs))
