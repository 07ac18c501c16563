"""The trials of a study in the form that strategies receive, updated incrementally."""

from __future__ import annotations

import bisect
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from nipq_search.cost import COSTS
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.coordinator.resolved import ResolvedSweep
from nipq_search.search.jobs import committed_record, job_folder
from nipq_search.search.strategies.expected_gain import Axes
from nipq_search.search.strategies.pareto import default_reference, non_dominated
from nipq_search.search.strategies.strategies import FinishedTrial, SearchState
from nipq_search.search.strategies.unseen_trials import UnseenTrials, is_foreign
from nipq_search.search.study.ledger import BUDGET, SLACK

TARGET = "budget_"
"""Prefix of the attributes that hold a trial's absolute targets."""

UNCOUNTED_FAILURES = 2
"""Number of failed trials of each budget that are ignored when the budget's trials are counted."""

MAX_FINISHED = 500
"""A strategy receives at most this many of the newest finished trials, in addition to the front.

Without a limit, each decision would take longer than the one before.
"""


def costs_of(trial: FrozenTrial) -> dict[str, float]:
    """Return the exact costs of a finished trial, from its attributes."""
    found = trial.user_attrs.items()
    return {k.removeprefix("cost_"): float(v) for k, v in found if k.startswith("cost_")}


def targets_of(trial: FrozenTrial) -> dict[str, float]:
    """Return the absolute targets of a trial, from its attributes; empty before they are set."""
    found = (
        (k.removeprefix(TARGET), v)
        for k, v in trial.user_attrs.items()
        if k.startswith(TARGET) and k != SLACK
    )
    return {name: float(value) for name, value in found if name in COSTS}


def _number(trial: FinishedTrial) -> int:
    return trial.number


class TrialHistory:
    """The finished trials of a study, except those that users added.

    Args:
        config: the sweep configuration.
        resolved: the sweep's graph and budgets.
        out: absolute path of the sweep's folder.
    """

    def __init__(self, config: SweepConfig, resolved: ResolvedSweep, out: Path) -> None:
        """Start without trials."""
        self._config, self._resolved, self._out = config, resolved, out
        self._sign = 1 if resolved.mode == "max" else -1
        self._unseen = UnseenTrials()
        self._finished: list[FinishedTrial] = []
        self._front: list[FinishedTrial] = []
        self._asked: list[tuple[int, dict[str, float]]] = []
        self._assigned: list[int] = []
        self._failures: dict[int, int] = {}

    def update(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Add the newly finished trials.

        Args:
            trials: all trials of the study, ordered by number.

        Returns:
            The trials that have not finished.
        """
        unfinished, new = [], []
        for trial in self._unseen.take(trials):
            if not trial.state.is_finished():
                unfinished.append(trial)
                continue
            if is_foreign(trial):
                continue
            bisect.insort(self._asked, (trial.number, targets_of(trial)), key=lambda a: a[0])
            self._count_for_budget(trial)
            if trial.state is TrialState.COMPLETE:
                new.append(
                    FinishedTrial(
                        number=trial.number,
                        metric=self._sign * trial.values[0],
                        cost=costs_of(trial),
                        targets=targets_of(trial),
                    )
                )
        if new:
            self._add(new)
        return unfinished

    def _count_for_budget(self, trial: FrozenTrial) -> None:
        """Count a finished trial toward its budget.

        The first `UNCOUNTED_FAILURES` failed trials of each budget do not count.
        """
        failed = trial.state is TrialState.FAIL
        if (index := trial.params.get(BUDGET)) is not None:
            self._failures[index] = self._failures.get(index, 0) + failed
            if not failed or self._failures[index] > UNCOUNTED_FAILURES:
                self._assigned.append(int(index))

    def _add(self, new: Sequence[FinishedTrial]) -> None:
        for trial in new:
            bisect.insort(self._finished, trial, key=_number)
        rivals = {t.number: t for t in [*self._front, *new]}
        cost = self._resolved.front_cost
        points = {n: (t.metric, t.cost[cost]) for n, t in rivals.items() if cost in t.cost}
        self._front = [rivals[number] for number in sorted(non_dominated(points, "max"))]

    def recent(self) -> list[FinishedTrial]:
        """Return the newest `MAX_FINISHED` COMPLETE trials, plus any others on the front."""
        newest = self._finished[-MAX_FINISHED:]
        return [*(t for t in self._front if t.number < newest[0].number), *newest]

    def all_but(self, numbers: Container[int]) -> list[FinishedTrial]:
        """Return all COMPLETE trials except those with these numbers."""
        return [t for t in self._finished if t.number not in numbers]

    def find(self, number: int) -> FinishedTrial | None:
        """Return a COMPLETE trial by its number, or None."""
        at = bisect.bisect_left(self._finished, number, key=_number)
        found = self._finished[at : at + 1]
        return found[0] if found and found[0].number == number else None

    def state(self, unfinished: Sequence[FrozenTrial]) -> SearchState:
        """Return the state on which the strategy bases its next decision.

        Args:
            unfinished: the trials that have not finished.
        """
        assigned = (t.params[BUDGET] for t in unfinished if BUDGET in t.params)
        asked = (targets for _, targets in self._asked[-MAX_FINISHED:])
        return SearchState(
            budgets=[budget.targets for budget in self._resolved.budgets],
            assigned=[*self._assigned, *assigned],
            running=[targets_of(t) for t in unfinished if t.state is TrialState.RUNNING],
            asked=[*asked, *map(targets_of, unfinished)],
            finished=self.recent(),
            axes=self._axes(),
        )

    def _axes(self) -> Axes | None:
        """Return the rectangle of the hypervolume, or None until the float model is trained."""
        resolved = self._resolved
        record = committed_record(job_folder(self._out, "float", 0)) or {}
        best = record.get("metrics", {}).get(resolved.metric)
        if best is None:
            return None
        given = self._config.search.reference
        reference = default_reference(best, resolved.mode) if given is None else given
        least, uniform = resolved.axis
        return Axes(
            cost=resolved.front_cost,
            least=least,
            most=min(uniform, resolved.costs[resolved.front_cost]["greatest"]),
            reference=self._sign * reference,
            best=self._sign * best,
        )

    def signed_metric(self, metrics: Mapping[str, float]) -> float:
        """Return the task's metric, negated if it is minimized, so that greater is better.

        The result is minus infinity if the metric is missing.
        """
        if self._resolved.metric not in metrics:
            return float("-inf")
        return self._sign * metrics[self._resolved.metric]
