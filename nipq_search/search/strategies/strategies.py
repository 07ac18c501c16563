"""Strategies, which select budget and starting point of the next trial.

To add one, derive a class from `Strategy` and register it in `STRATEGIES`. Other packages declare
an entry point instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nipq_search.registry import Registry
from nipq_search.search.strategies.expected_gain import SAME, Axes, most_promising_cost


@dataclass(frozen=True, kw_only=True)
class FinishedTrial:
    """A COMPLETE trial.

    Attributes:
        number: trial number.
        cost: exact costs, by cost name.
        metric: the validation metric; greater is better.
        targets: absolute targets that the trial was assigned, by cost name.
    """

    number: int
    cost: Mapping[str, float]
    metric: float
    targets: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SearchState:
    """Everything that a strategy bases its decisions on.

    Attributes:
        budgets: absolute targets of the sweep's budgets.
        assigned: budget index of every trial that counts toward its budget; see `FREE_FAILURES`.
        running: absolute targets of the running trials.
        asked: absolute targets of all trials, however they ended.
        finished: COMPLETE trials.
        axes: the rectangle of the hypervolume; None until the float model is trained.
    """

    budgets: Sequence[Mapping[str, float]]
    assigned: Sequence[int] = ()
    running: Sequence[Mapping[str, float]] = ()
    asked: Sequence[Mapping[str, float]] = ()
    finished: Sequence[FinishedTrial] = ()
    axes: Axes | None = None


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The budget of a trial.

    Attributes:
        budget: index of one of the sweep's budgets, which the sampler conditions on.
        targets: absolute targets that replace those of the budget; empty to keep them.
    """

    budget: int
    targets: Mapping[str, float] = field(default_factory=dict)


def least_served(state: SearchState) -> int:
    """Return the index of the budget with the fewest trials; the first one in a tie."""
    counts = [0] * len(state.budgets)
    for index in state.assigned:
        if 0 <= index < len(counts):
            counts[index] += 1
    return counts.index(min(counts))


class Strategy:
    """Assigns budgets and parents to trials.

    A strategy has no state of its own: it depends on the ledger alone, so a resumed sweep makes
    the same decisions. By default, the budget with the fewest trials comes next, and every trial
    starts from the float model, trains for all epochs and has a noise phase.

    Attributes:
        noise_factor: factor on the noise phase's share of the steps in a trial with a parent.
        least_noise_steps: noise phases with fewer steps are skipped, because bit-widths barely
            change in them.
        rungs: fractions of the training after which a trial pauses. It continues only if it is
            among the best with its budget; see `halving`.
    """

    noise_factor = 1.0
    least_noise_steps = 0
    rungs: tuple[float, ...] = ()

    def assign(self, state: SearchState) -> Assignment:
        """Return the budget of the next trial."""
        return Assignment(budget=least_served(state))

    def parent(self, budget: Mapping[str, float], finished: Sequence[FinishedTrial]) -> int | None:
        """Return the number of the trial that a new one starts from; None for the float model.

        Args:
            budget: absolute targets of the new trial.
            finished: the COMPLETE trials at this moment.
        """
        return None

    def epochs_share(self, budget: Mapping[str, float], parent: FinishedTrial | None) -> float:
        """Return the fraction of `train.epochs` for which a trial trains.

        Args:
            budget: absolute targets of the trial.
            parent: the trial that it starts from; None for the float model.
        """
        return 1.0


class Independent(Strategy):
    """Starts every trial from the float model; budgets with the fewest trials come first."""


class Halving(Strategy):
    """Like `Independent`, but stops trials early that are not among the best with their budget."""

    rungs = (1 / 9, 1 / 3)


_AT_TARGET = 0.97
"""A trial counts as being at a target if it uses at least this fraction of it."""


def _ratios(trial: FinishedTrial, budget: Mapping[str, float]) -> list[float]:
    """Return the fraction of each target that a trial uses.

    A trial cannot always use up its target: another target may bind, coarse bit-widths leave a
    remainder, and a target may exceed the model's largest cost. The target that it was assigned
    then counts in place of its cost.
    """
    found = []
    for name, target in budget.items():
        ratio, assigned = trial.cost[name] / target, trial.targets.get(name, 0.0) / target
        found.append(assigned if ratio < _AT_TARGET <= assigned else ratio)
    return found


class Ladder(Strategy):
    """Starts a trial from the nearest finished one at an equal or larger budget, and shortens it.

    It never waits for a trial to finish. Trials with a parent have no noise phase, which costs
    more than it gains in so short a training run (docs/front-quality.md).
    """

    noise_factor = 0.0
    _SHARE = 1 / 3
    _STEP_OCTAVES = 0.1

    def parent(self, budget: Mapping[str, float], finished: Sequence[FinishedTrial]) -> int | None:
        """Return the best of the nearest trials; costs within a tenth of an octave are equal."""
        best: tuple[int, float, int] | None = None
        for trial in finished:
            ratios = _ratios(trial, budget)
            if min(ratios) < _AT_TARGET:
                continue
            distance = round(math.log2(max(ratios)) / self._STEP_OCTAVES)
            key = (distance, -trial.metric, trial.number)
            if best is None or key < best:
                best = key
        return None if best is None else best[2]

    def epochs_share(self, budget: Mapping[str, float], parent: FinishedTrial | None) -> float:
        """Return one third for a trial with a parent, else 1."""
        return 1.0 if parent is None else self._SHARE


class Fill(Strategy):
    """Continues a ladder, once every budget has a trial, where the front can improve most.

    The best place may lie between two budgets but never beyond the smallest or largest one; see
    `most_promising_cost`. Only the target of the front's cost moves; other targets of the nearest
    budget stay. Budgets without a target for the front's cost get an equal share of the trials.
    The first trials train for less than all epochs, because every later trial builds on them.
    """

    noise_factor = Ladder.noise_factor
    least_noise_steps = 200
    _FIRST, _NEW_PLACE = 0.75, 0.3

    def __init__(self) -> None:
        """Choose parents like `Ladder`."""
        self._ladder = Ladder()

    def assign(self, state: SearchState) -> Assignment:
        """Return a budget without a trial, else the most promising place of the front."""
        index = least_served(state)
        axes = state.axes
        if axes is None or index not in state.assigned:
            return Assignment(budget=index)
        name = axes.cost
        targets = {i: t[name] for i, t in enumerate(state.budgets) if name in t}
        points = [(t.metric, t.cost[name]) for t in state.finished if name in t.cost]
        if not targets or not points or self._is_turn_of(index, targets, state):
            return Assignment(budget=index)
        running = [t[name] for t in state.running if name in t]
        asked = [t[name] for t in state.asked if name in t]
        within = min(targets.values()), max(targets.values())
        cost = most_promising_cost(points, running, asked, axes, within)
        nearest = self._nearest(cost, targets, state, name)
        return Assignment(budget=nearest, targets={**state.budgets[nearest], name: cost})

    @staticmethod
    def _nearest(cost: float, targets: Mapping[int, float], state: SearchState, name: str) -> int:
        """Return the budget nearest to a cost.

        Ties go to the budget whose other targets equal those of the trial at this cost, then to
        the one with the fewest trials.
        """
        at_cost = [t for t in state.finished if t.cost.get(name) == cost]
        repeated = max(at_cost, key=lambda t: t.metric).targets if at_cost else {}

        def rank(index: int) -> tuple[float, bool, int, int]:
            others = {n: target for n, target in state.budgets[index].items() if n != name}
            alike = bool(at_cost) and others == {n: t for n, t in repeated.items() if n != name}
            distance = round(abs(math.log(targets[index] / cost)), 9)
            return distance, not alike, state.assigned.count(index), index

        return min(targets, key=rank)

    @staticmethod
    def _is_turn_of(index: int, targets: Mapping[int, float], state: SearchState) -> bool:
        """Return whether a budget has no target for the front's cost and fewer trials than most.

        Args:
            index: the budget with the fewest trials.
            targets: targets of the front's cost, by the index of the budgets that have one.
            state: what the strategy bases its decisions on.
        """
        share = len(state.assigned) / len(state.budgets)
        return index not in targets and state.assigned.count(index) < share

    def parent(self, budget: Mapping[str, float], finished: Sequence[FinishedTrial]) -> int | None:
        """Return the parent that `Ladder` would choose."""
        return self._ladder.parent(budget, finished)

    def epochs_share(self, budget: Mapping[str, float], parent: FinishedTrial | None) -> float:
        """Return a small fraction at a new place, and 1 if the parent is at the same place.

        A repeat must train in full, because a shorter one gains nothing.
        """
        if parent is None:
            return self._FIRST
        nearest = max(_ratios(parent, budget))
        return 1.0 if math.log2(nearest) <= SAME else self._NEW_PLACE


def _problem(name: str, value: Any) -> str | None:
    fits = isinstance(value, type) and issubclass(value, Strategy)
    return None if fits else "not a subclass of nipq_search.search.strategies.strategies.Strategy"


STRATEGIES: Registry[type[Strategy]] = Registry(
    "strategy", group="nipq_search.strategies", check=_problem
)
"""Strategies, by their names in sweep files."""

STRATEGIES.register("independent", Independent)
STRATEGIES.register("ladder", Ladder)
STRATEGIES.register("fill", Fill)
STRATEGIES.register("halving", Halving)
