"""Strategies: which budget, and which starting point, the next trial gets.

To add one, derive a class from `Strategy` and register it in `STRATEGIES`; another package
offers an entry point instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nipq_search.registry import Registry
from nipq_search.search.strategies.expected_gain import SAME, Axes, most_room


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A COMPLETE trial.

    Attributes:
        number: the trial's.
        cost: its exact costs.
        metric: the greater the better.
        targets: absolute targets that it was to keep.
    """

    number: int
    cost: Mapping[str, float]
    metric: float
    targets: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a strategy decides by.

    Attributes:
        budgets: absolute targets of the sweep's budgets.
        assigned: budget index of every trial so far that has not failed.
        running: absolute targets of the trials that run now.
        asked: those of all trials, however they ended.
        finished: every COMPLETE trial.
        axes: how the front is measured; None before the float model is there.
    """

    budgets: Sequence[Mapping[str, float]]
    assigned: Sequence[int] = ()
    running: Sequence[Mapping[str, float]] = ()
    asked: Sequence[Mapping[str, float]] = ()
    finished: Sequence[Finished] = ()
    axes: Axes | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a trial is asked to keep.

    Attributes:
        budget: index of one of the sweep's budgets, by which the sampler learns.
        targets: absolute targets in place of that budget's, or empty.
    """

    budget: int
    targets: Mapping[str, float] = field(default_factory=dict)


def least_served(seen: Seen) -> int:
    """The budget with the fewest trials; the first of several."""
    counts = [0] * len(seen.budgets)
    for index in seen.assigned:
        if 0 <= index < len(counts):
            counts[index] += 1
    return counts.index(min(counts))


class Strategy:
    """Assigns budgets and parents. It sees the ledger alone, so a resume changes nothing.

    What is not overridden: the least served budget is next, and every trial starts from the float
    model, trains whole and has its noise phase.

    Attributes:
        noise_factor: factor on the noise phase's share of the steps of a trial with a parent.
        least_noise_steps: noise phases of fewer steps are left out: bit-widths learn nothing in
            them.
        rungs: shares of the training after which a trial pauses, to go on only if it is among the
            best under its budget; see `halving`.
    """

    noise_factor = 1.0
    least_noise_steps = 0
    rungs: tuple[float, ...] = ()

    def target(self, seen: Seen) -> Target:
        """What the next trial has to keep."""
        return Target(budget=least_served(seen))

    def parent(self, budget: Mapping[str, float], finished: Sequence[Finished]) -> int | None:
        """Number of the trial that a new one starts from; None for the float model.

        Args:
            budget: absolute targets of the new trial.
            finished: every COMPLETE trial at this moment.
        """
        return None

    def epochs_share(self, budget: Mapping[str, float], parent: Finished | None) -> float:
        """The share of `train.epochs` that a trial with this parent, or with none, trains."""
        return 1.0


class Independent(Strategy):
    """Every trial starts from the float model; budgets take turns, least served first."""


class Halving(Strategy):
    """As `Independent`, but a trial goes on only if it is among the best under its budget."""

    rungs = (1 / 9, 1 / 3)


_AS_LARGE = 0.97
"""The share of a target from which on a trial counts as being at it."""


def _ratios(trial: Finished, budget: Mapping[str, float]) -> list[float]:
    """What a trial has of each target: its cost, or what it was given and could not use up.

    Of several targets one binds, coarse bit-widths leave a rest, and a target may lie above all
    that the model can cost.
    """
    found = []
    for name, target in budget.items():
        ratio, given = trial.cost[name] / target, trial.targets.get(name, 0.0) / target
        found.append(given if ratio < _AS_LARGE <= given else ratio)
    return found


class Ladder(Strategy):
    """A trial starts from the nearest finished one at an equal or larger budget, and is shorter.

    It waits for nothing: it takes what is finished when it is asked for. It has no noise phase,
    which in so short a training costs more than it finds (docs/front-quality.md).
    """

    noise_factor = 0.0
    _SHARE = 1 / 3
    _STEP = 0.1

    def parent(self, budget: Mapping[str, float], finished: Sequence[Finished]) -> int | None:
        """The best of the nearest: costs within a tenth of an octave count as equally near."""
        best: tuple[int, float, int] | None = None
        for trial in finished:
            ratios = _ratios(trial, budget)
            if min(ratios) < _AS_LARGE:
                continue
            distance = round(math.log2(max(ratios)) / self._STEP)
            key = (distance, -trial.metric, trial.number)
            if best is None or key < best:
                best = key
        return None if best is None else best[2]

    def epochs_share(self, budget: Mapping[str, float], parent: Finished | None) -> float:
        """A third where there is a parent."""
        return 1.0 if parent is None else self._SHARE


class Fill(Strategy):
    """A ladder that goes on, once each budget has a trial, where the front can grow most.

    That may be between budgets, never beyond the smallest and the largest: see `gaps.most_room`.
    Only the front's cost is moved; other targets of the nearest budget stay. Budgets that leave
    the front's cost free get an equal share of the trials. The first round is short, for all later
    trials build on it.
    """

    noise_factor = Ladder.noise_factor
    least_noise_steps = 200
    _FIRST, _NEW_PLACE = 0.75, 0.3

    def __init__(self) -> None:
        """Parents are those of a ladder."""
        self._ladder = Ladder()

    def target(self, seen: Seen) -> Target:
        """A budget that has no trial, else the front's weakest place."""
        index = least_served(seen)
        axes = seen.axes
        if axes is None or index not in seen.assigned:
            return Target(budget=index)
        named = {i: t[axes.cost] for i, t in enumerate(seen.budgets) if axes.cost in t}
        points = [(t.metric, t.cost[axes.cost]) for t in seen.finished if axes.cost in t.cost]
        running = [t[axes.cost] for t in seen.running if axes.cost in t]
        if not named or not points or self._has_turn(index, named, seen):
            return Target(budget=index)
        asked = [t[axes.cost] for t in seen.asked if axes.cost in t]
        within = min(named.values()), max(named.values())
        cost = most_room(points, running, asked, axes, within)
        nearest = self._nearest(cost, named, seen, axes.cost)
        return Target(budget=nearest, targets={**seen.budgets[nearest], axes.cost: cost})

    @staticmethod
    def _nearest(cost: float, named: Mapping[int, float], seen: Seen, name: str) -> int:
        """The named budget nearest to a cost: of several, that of the trial which is there.

        Where there is none, or its other targets are no budget's, the least served of them.
        """
        there = [t for t in seen.finished if t.cost.get(name) == cost]
        repeated = max(there, key=lambda t: t.metric).targets if there else {}

        def rank(index: int) -> tuple[float, bool, int, int]:
            others = {n: target for n, target in seen.budgets[index].items() if n != name}
            alike = bool(there) and others == {n: t for n, t in repeated.items() if n != name}
            distance = round(abs(math.log(named[index] / cost)), 9)
            return distance, not alike, seen.assigned.count(index), index

        return min(named, key=rank)

    @staticmethod
    def _has_turn(index: int, named: Mapping[int, float], seen: Seen) -> bool:
        """Whether the least served budget leaves the front's cost free and is behind the mean."""
        share = len(seen.assigned) / len(seen.budgets)
        return index not in named and seen.assigned.count(index) < share

    def parent(self, budget: Mapping[str, float], finished: Sequence[Finished]) -> int | None:
        """As in `Ladder`."""
        return self._ladder.parent(budget, finished)

    def epochs_share(self, budget: Mapping[str, float], parent: Finished | None) -> float:
        """Little at a new place, all where the parent is there already: less gains nothing."""
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
"""Strategies by the names that sweep files use."""

STRATEGIES.register("independent", Independent)
STRATEGIES.register("ladder", Ladder)
STRATEGIES.register("fill", Fill)
STRATEGIES.register("halving", Halving)
