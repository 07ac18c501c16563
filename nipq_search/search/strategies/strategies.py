"""Strategies, which select the budget, the starting point and the length of the next trial.

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
        metric: the validation metric, negated if it is minimized, so that greater is better.
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
        assigned: budget index of every trial, except for a few failed trials per budget
            (`UNCOUNTED_FAILURES` in `coordinator/history.py`).
        running: absolute targets of the running trials.
        asked: absolute targets of the unfinished trials and of the newest finished ones, including
            failed ones.
        finished: the newest COMPLETE trials, and older ones on the front.
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
    """The budget that a strategy assigns to a trial.

    Attributes:
        budget: index of one of the sweep's budgets, which the sampler conditions on.
        targets: absolute targets that replace those of the budget; empty to keep them.
    """

    budget: int
    targets: Mapping[str, float] = field(default_factory=dict)


def least_served(state: SearchState) -> int:
    """Return the index of the budget with the fewest trials; on a tie, the first one."""
    counts = [0] * len(state.budgets)
    for index in state.assigned:
        if 0 <= index < len(counts):
            counts[index] += 1
    return counts.index(min(counts))


class Strategy:
    """Assigns budgets and parents to trials.

    A strategy has no state of its own: its decisions depend on its arguments alone, so they are
    the same in a resumed sweep. By default, the budget with the fewest trials comes next, and
    every trial starts from the float model, trains for all epochs and has a noise phase.

    Attributes:
        noise_factor: multiplies the noise phase's share of the steps in a trial with a parent.
        least_noise_steps: noise phases with fewer steps are skipped, because bit-widths barely
            change in them.
        rungs: fractions of the training run after which a trial pauses. It continues only if it
            is among the best trials with its budget; see `halving.py`.
    """

    noise_factor = 1.0
    least_noise_steps = 0
    rungs: tuple[float, ...] = ()

    def assign(self, state: SearchState) -> Assignment:
        """Return the budget of the next trial."""
        return Assignment(budget=least_served(state))

    def parent(self, budget: Mapping[str, float], finished: Sequence[FinishedTrial]) -> int | None:
        """Return the number of the trial that a new one starts from, or None for the float model.

        Args:
            budget: absolute targets of the new trial.
            finished: the COMPLETE trials to choose from.
        """
        return None

    def epochs_share(self, budget: Mapping[str, float], parent: FinishedTrial | None) -> float:
        """Return the fraction of `train.epochs` for which a trial trains.

        Args:
            budget: absolute targets of the trial.
            parent: the trial that it starts from, or None for the float model.
        """
        return 1.0


class Independent(Strategy):
    """Starts every trial from the float model; budgets with the fewest trials come first."""


class Halving(Strategy):
    """Like `Independent`, with early stopping: only the best trials with each budget continue."""

    rungs = (1 / 9, 1 / 3)


_AT_TARGET = 0.97
"""A trial counts as being at a target if its cost is at least this fraction of the target."""


def _ratios(trial: FinishedTrial, budget: Mapping[str, float]) -> list[float]:
    """Return the fraction of each target that a trial uses.

    A trial cannot always use its whole target: another target may be binding, the allowed
    bit-widths may be too coarse, or the target may exceed the model's largest cost. In these
    cases, the target that the trial was assigned counts in place of its cost.
    """
    found = []
    for name, target in budget.items():
        ratio, assigned = trial.cost[name] / target, trial.targets.get(name, 0.0) / target
        found.append(assigned if ratio < _AT_TARGET <= assigned else ratio)
    return found


class Ladder(Strategy):
    """Starts each trial from the nearest finished one at an equal or larger budget.

    The strategy never waits for a trial to finish: without a suitable one, a trial starts from the
    float model. Trials with a parent train for a third of the epochs and have no noise phase,
    which costs more than it gains in such a short training run (docs/front-quality.md).
    """

    noise_factor = 0.0
    _SHARE = 1 / 3
    _STEP_OCTAVES = 0.1

    def parent(self, budget: Mapping[str, float], finished: Sequence[FinishedTrial]) -> int | None:
        """Return the number of the best of the nearest trials at an equal or larger budget.

        The result is None if there is no such trial. Distances are rounded to tenths of an octave.
        """
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
        """Return one third for a trial with a parent, and 1 otherwise."""
        return 1.0 if parent is None else self._SHARE


class Fill(Strategy):
    """Gives every budget one trial, then fills gaps in the front; chooses parents like `Ladder`.

    Each further trial goes where it is expected to improve the front the most. This place may lie
    between two budgets but never beyond the smallest or largest one; see `most_promising_cost`.
    Only the target for the front's cost is set to that place; the other targets are those of the
    nearest budget. Budgets without a target for the front's cost get an equal share of the trials.
    Trials without a parent do not train for all epochs, because later trials continue from them.
    """

    noise_factor = Ladder.noise_factor
    least_noise_steps = 200
    _FIRST, _NEW_PLACE = 0.75, 0.3

    def __init__(self) -> None:
        """Create the ladder that chooses parents."""
        self._ladder = Ladder()

    def assign(self, state: SearchState) -> Assignment:
        """Return a budget that has no trial yet; otherwise, usually, the most promising place.

        The budget with the fewest trials is returned instead while there is no finished trial, if
        no budget has a target for the front's cost, or if it is the turn of a budget without one.
        """
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
        """Return the index of the budget that is nearest to a cost.

        On a tie, a budget whose other targets equal those of the trial at this cost is preferred,
        then the one with the fewest trials.
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
        """Return whether a budget has no target for the front's cost and too few trials.

        Too few means less than an equal share of the trials.

        Args:
            index: index of the budget with the fewest trials.
            targets: targets of the front's cost, by the index of the budgets that have one.
            state: what the strategy bases its decisions on.
        """
        share = len(state.assigned) / len(state.budgets)
        return index not in targets and state.assigned.count(index) < share

    def parent(self, budget: Mapping[str, float], finished: Sequence[FinishedTrial]) -> int | None:
        """Return the parent that `Ladder` would choose."""
        return self._ladder.parent(budget, finished)

    def epochs_share(self, budget: Mapping[str, float], parent: FinishedTrial | None) -> float:
        """Return 0.75 without a parent, 0.3 at a new place, and 1 for a repeat.

        A repeat, whose parent is at the same place, must train in full, because a shorter training
        run gains nothing.
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
