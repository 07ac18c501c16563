"""Optuna's samplers by the names that sweep files use, and how they learn across budgets.

To add one, write a function from a seed to a sampler and a line in `SAMPLERS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIISampler,
    PartialFixedSampler,
    RandomSampler,
    TPESampler,
)
from optuna.samplers.nsgaii import BLXAlphaCrossover
from optuna.trial import FrozenTrial, TrialState, create_trial


def tpe(seed: int) -> BaseSampler:
    """Tree-structured Parzen estimator; running trials count as bad, to keep workers apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(seed=seed, n_startup_trials=10, multivariate=True, constant_liar=True)


def random(seed: int) -> BaseSampler:
    """Independent draws."""
    return RandomSampler(seed=seed)


def gp(seed: int) -> BaseSampler:
    """A Gaussian process; its time grows with the cube of the trials, fine up to some 300."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return GPSampler(seed=seed, n_startup_trials=10, deterministic_objective=False)


def nsga2(seed: int) -> BaseSampler:
    """A genetic algorithm, in generations of ten: a sweep has tens of trials.

    Children blend the numbers of their parents, so that no proposal repeats another.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        blend = BLXAlphaCrossover()
        return NSGAIISampler(seed=seed, population_size=10, crossover=blend, crossover_prob=1.0)


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": tpe,
    "random": random,
    "gp": gp,
    "nsga2": nsga2,
}
"""Samplers by name; each takes the trial's own seed, so a resumed search repeats nothing."""

LEARN_BY_REGRET = frozenset({"tpe", "gp"})
"""Samplers that are shown regrets instead of metric and cost; see `ByRegret`."""

ENOUGH = 20
"""Trials of the nearest budgets that are shown, if there are so many."""


class ByRegret(BaseSampler):
    """Lets a sampler learn what is good under one budget.

    The budget of a trial is given, so there is nothing to trade off: what counts is by how much a
    trial falls short of the best one under its own budget. The base sampler works on a study of
    these regrets, of trials under the nearest budgets, where good hyperparameters are alike. On a
    surrogate whose best `lambda` hangs on the budget that beats metric and cost as two objectives,
    regrets of all budgets, and univariate TPE (docs/front-quality.md).

    Args:
        base: sampler of one objective.
        key: name of the parameter that is the budget's index.
        budget: its value in the next trial.
        space: distributions of every parameter, the budget's included.
        sign: 1 where the metric is maximized, else -1.
    """

    def __init__(
        self,
        base: BaseSampler,
        *,
        key: str,
        budget: int,
        space: Mapping[str, BaseDistribution],
        sign: int,
    ) -> None:
        """Remember what to propose; nothing is sampled yet."""
        self._base, self._key, self._budget = base, key, budget
        self._space, self._sign = dict(space), sign
        self._proposed: dict[str, Any] | None = None

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Nothing: all parameters are proposed at the first question."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing; see `infer_relative_search_space`."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A parameter of the base sampler's proposal."""
        if self._proposed is None:
            others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
            self._proposed = self._propose(others)
        return self._proposed[param_name]

    def _propose(self, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        complete = [t for t in trials if t.state is TrialState.COMPLETE and self._key in t.params]
        best: dict[int, float] = {}
        for trial in complete:
            budget = trial.params[self._key]
            best[budget] = max(best.get(budget, float("-inf")), self._metric(trial))
        near = self._nearest(complete)
        shown = [
            self._copy(t, self._metric(t) - best[t.params[self._key]])
            for t in complete
            if abs(t.params[self._key] - self._budget) <= near
        ]
        shown += [self._copy(t) for t in trials if t.state is TrialState.RUNNING]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler = PartialFixedSampler({self._key: self._budget}, self._base)
        regrets = optuna.create_study(direction="maximize", sampler=sampler)
        regrets.add_trials([trial for trial in shown if trial is not None])
        return regrets.ask(self._space).params

    def _nearest(self, complete: Sequence[FrozenTrial]) -> int:
        """How far the budgets may be so that `ENOUGH` trials are shown."""
        distances = sorted(abs(t.params[self._key] - self._budget) for t in complete)
        return int(distances[min(ENOUGH, len(distances)) - 1]) if distances else 0

    def _metric(self, trial: FrozenTrial) -> float:
        return self._sign * float(trial.values[0])

    def _copy(self, trial: FrozenTrial, value: float | None = None) -> FrozenTrial | None:
        """The trial with another value; None for one of another space, as somebody may enqueue."""
        try:
            return create_trial(
                state=trial.state,
                params={name: trial.params[name] for name in self._space},
                distributions=self._space,
                value=value,
            )
        except (KeyError, ValueError, TypeError):
            return None
