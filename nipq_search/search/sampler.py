"""Optuna's samplers by the names that sweep files use, and how they learn across budgets.

To add one, write a function from a seed to a sampler and a line in `SAMPLERS`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
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

RUNGS = "rung_metrics"
"""Attribute of a trial: the metric at each rung so far, None where it was no number."""

MOST = 300
"""Trials that are shown at most."""

ENOUGH = 20
"""Trials of the nearest budgets that are shown, if there are so many."""


def middle(distribution: BaseDistribution) -> Any:
    """The middle of a range, by ratio where it is logarithmic; the first of choices."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    low, high = distribution.low, distribution.high
    found = math.sqrt(low * high) if distribution.log else (low + high) / 2
    return found if isinstance(distribution, FloatDistribution) else round(found)


class ByRegret(BaseSampler):
    """Lets a sampler learn what is good under one budget.

    The budget of a trial is given, so there is nothing to trade off: what counts is by how much a
    trial falls short of the best one under its own budget. The base sampler works on a study of
    these regrets, of trials under the nearest budgets, where good hyperparameters are alike. On a
    surrogate whose best `lambda` hangs on the budget that beats metric and cost as two objectives,
    regrets of all budgets, and univariate TPE (docs/front-quality.md). A trial that pauses, or was
    pruned, at a rung teaches by how much it fell short there of the best that got so far. The
    first trial under a budget takes the middle of every range: it is what others start from.

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
        if not any(t.params.get(self._key) == self._budget for t in trials):
            middles = {name: middle(form) for name, form in self._space.items()}
            return {**middles, self._key: self._budget}
        measured = {t.number: self._levels(t) for t in trials if self._key in t.params}
        known = [t for t in trials if measured.get(t.number)]
        best: dict[tuple[int, int], float] = {}
        for trial in known:
            for level, metric in enumerate(measured[trial.number]):
                at = (trial.params[self._key], level)
                best[at] = max(best.get(at, float("-inf")), metric)
        near = self._nearest(known)
        shown = []
        for trial in known:
            budget, levels = trial.params[self._key], measured[trial.number]
            if abs(budget - self._budget) <= near:
                regret = levels[-1] - best[budget, len(levels) - 1]
                shown.append(self._copy(trial, regret if regret <= 0 else float("-inf")))
        shown = self._bounded([trial for trial in shown if trial is not None])
        running = [t for t in trials if t.state is TrialState.RUNNING]
        shown += [self._copy(t) for t in running if not measured.get(t.number)][-MOST:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler = PartialFixedSampler({self._key: self._budget}, self._base)
        regrets = optuna.create_study(direction="maximize", sampler=sampler)
        regrets.add_trials([trial for trial in shown if trial is not None])
        return regrets.ask(self._space).params

    def _bounded(self, shown: Sequence[FrozenTrial]) -> list[FrozenTrial | None]:
        """The best half of `MOST` and the newest of the rest: asking must not get ever slower."""
        if len(shown) <= MOST:
            return list(shown)
        best = sorted(range(len(shown)), key=lambda i: -(shown[i].value or 0.0))[: MOST // 2]
        kept = set(best)
        newest = [i for i in range(len(shown)) if i not in kept][-(MOST - len(kept)) :]
        return [shown[i] for i in sorted(kept | set(newest))]

    def _nearest(self, known: Sequence[FrozenTrial]) -> int:
        """How far the budgets may be so that `ENOUGH` trials are shown."""
        distances = sorted(abs(t.params[self._key] - self._budget) for t in known)
        return int(distances[min(ENOUGH, len(distances)) - 1]) if distances else 0

    def _levels(self, trial: FrozenTrial) -> list[float]:
        """What it measured at each rung, then at its end, the greater the better."""
        if trial.state is TrialState.FAIL:
            return []
        last = [trial.values[0]] if trial.state is TrialState.COMPLETE else []
        found = [*trial.user_attrs.get(RUNGS, []), *last]
        return [float("-inf") if m is None else self._sign * float(m) for m in found]

    def _copy(self, trial: FrozenTrial, value: float | None = None) -> FrozenTrial | None:
        """The trial with another value; None for one of another space, as somebody may enqueue."""
        try:
            return create_trial(
                state=TrialState.RUNNING if value is None else TrialState.COMPLETE,
                params={name: trial.params[name] for name in self._space},
                distributions=self._space,
                value=value,
            )
        except (KeyError, ValueError, TypeError):
            return None
