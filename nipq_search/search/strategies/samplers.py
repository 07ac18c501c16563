"""Optuna's samplers by their names in sweep files, and how they learn across budgets.

To add one, write a function that builds a sampler from a seed, wrap it in a `SamplerFactory` and
register it in `SAMPLERS`. Other packages declare an entry point instead.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import datetime
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from optuna.trial import FrozenTrial, TrialState

from nipq_search.registry import Registry
from nipq_search.search.strategies.unseen_trials import UnseenTrials


@dataclass(frozen=True)
class SamplerFactory:
    """An entry of `SAMPLERS`: how to build a sampler, and what it learns from.

    Attributes:
        build: takes the seed of one trial and returns a sampler. A new sampler is built for every
            trial, so a resumed search neither repeats nor skips a proposal.
        learns_by_regret: whether the sampler optimizes a single objective, the regret within a
            budget (see `RegretSampler`), instead of the metric and the cost.
    """

    build: Callable[[int], BaseSampler]
    learns_by_regret: bool = False

    def __call__(self, seed: int) -> BaseSampler:
        """Build a sampler from the seed of one trial."""
        return self.build(seed)


def tpe(seed: int) -> BaseSampler:
    """Return a sampler based on a tree-structured Parzen estimator.

    Running trials are treated as bad ones, so that concurrent trials explore different regions.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(seed=seed, n_startup_trials=10, multivariate=True, constant_liar=True)


def random(seed: int) -> BaseSampler:
    """Return a sampler that draws all parameters independently."""
    return RandomSampler(seed=seed)


def gp(seed: int) -> BaseSampler:
    """Return a sampler based on a Gaussian process; each proposal takes longer than with `tpe`.

    The time per proposal is cubic in the number of trials that it learns from.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return GPSampler(seed=seed, n_startup_trials=10, deterministic_objective=False)


def nsga2(seed: int) -> BaseSampler:
    """Return an NSGA-II sampler with generations of ten, because a sweep has tens of trials.

    The crossover blends the numerical parameters of two parents, so proposals do not repeat.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        blend = BLXAlphaCrossover()
        return NSGAIISampler(seed=seed, population_size=10, crossover=blend, crossover_prob=1.0)


def _problem(name: str, value: Any) -> str | None:
    fits = isinstance(value, SamplerFactory)
    return None if fits else "not a nipq_search.search.strategies.samplers.SamplerFactory"


SAMPLERS: Registry[SamplerFactory] = Registry(
    "sampler", group="nipq_search.samplers", check=_problem
)
"""Sampler factories by name. Each is called with a trial's own seed, so a resumed search does not
repeat proposals."""

SAMPLERS.register("tpe", SamplerFactory(tpe, learns_by_regret=True))
SAMPLERS.register("random", SamplerFactory(random))
SAMPLERS.register("gp", SamplerFactory(gp, learns_by_regret=True))
SAMPLERS.register("nsga2", SamplerFactory(nsga2))

RUNGS = "rung_metrics"
"""Trial attribute: the metric at each rung so far, with None for values that were not finite."""

MAX_OBSERVATIONS = 150
"""Maximum number of observations that a sampler learns from."""

MIN_OBSERVATIONS = 20
"""A sampler learns from the nearest budgets that together have at least this many observations."""


def middle(distribution: BaseDistribution) -> Any:
    """Return the midpoint of a range (geometric for a logarithmic range), or the first choice."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    low, high = distribution.low, distribution.high
    found = math.sqrt(low * high) if distribution.log else (low + high) / 2
    return found if isinstance(distribution, FloatDistribution) else round(found)


class Observation(NamedTuple):
    """Measurements of a trial.

    Attributes:
        number: trial number.
        budget: index of the trial's budget.
        levels: the metric at each rung, then at the end of training; greater is better. It is
            minus infinity at rungs where it was not a finite number.
        trial: the trial.
    """

    number: int
    budget: int
    levels: Sequence[float]
    trial: FrozenTrial


class History:
    """The observations of a study, updated incrementally.

    Args:
        key: name of the parameter that holds the budget's index.
        sign: 1 if the metric is maximized, -1 if it is minimized.

    Attributes:
        observations: observations of finished trials, by budget, ordered by trial number.
        best: the best metric, by budget and level.
        budgets: indices of the budgets that have finished trials.
    """

    def __init__(self, key: str, sign: int) -> None:
        """Start without observations."""
        self.key, self._sign = key, sign
        self.observations: dict[int, list[Observation]] = {}
        self.best: dict[tuple[int, int], float] = {}
        self.budgets: set[int] = set()
        self._unseen = UnseenTrials()

    def update(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Add the newly finished trials.

        Args:
            trials: all trials of the study, ordered by number.

        Returns:
            The trials that have not finished.
        """
        unfinished = []
        for trial in self._unseen.take(trials):
            if not trial.state.is_finished():
                unfinished.append(trial)
                continue
            if isinstance(trial.params.get(self.key), int):
                self.budgets.add(trial.params[self.key])
            if observation := self.observe(trial):
                same_budget = self.observations.setdefault(observation.budget, [])
                bisect.insort(same_budget, observation, key=lambda other: other.number)
                self.raise_best(self.best, observation)
        return unfinished

    def observe(self, trial: FrozenTrial) -> Observation | None:
        """Return the observation of a trial, or None if it has none.

        A trial has none if it failed, has no budget, reached neither a rung nor the end of its
        training, or ended with a metric that is not finite.
        """
        # Trials that users add may have parameters of any type.
        if trial.state is TrialState.FAIL or not isinstance(trial.params.get(self.key), int):
            return None
        last = [trial.values[0]] if trial.state is TrialState.COMPLETE else []
        if not all(map(math.isfinite, last)):
            return None
        found = [*trial.user_attrs.get(RUNGS, []), *last]
        levels = [float("-inf") if m is None else self._sign * float(m) for m in found]
        budget = trial.params[self.key]
        return Observation(trial.number, budget, levels, trial) if levels else None

    def raise_best(self, best: dict[tuple[int, int], float], observation: Observation) -> None:
        """Raise the entries of `best`, by budget and level, that an observation exceeds.

        Missing entries are added.
        """
        for level, metric in enumerate(observation.levels):
            at = (observation.budget, level)
            best[at] = max(best.get(at, float("-inf")), metric)


class RegretSampler(BaseSampler):
    """Lets a single-objective sampler learn which hyperparameters suit one budget.

    The budget of a trial is given, so there is no trade-off to explore. What matters is the
    regret: the amount by which a trial falls short of the best trial with the same budget. The
    base sampler operates on a study of these regrets, limited to the trials of the nearest
    budgets, for which similar hyperparameters work well. On a surrogate benchmark where the best
    `lambda` depends on the budget, this outperforms three alternatives: metric and cost as two
    objectives, the regrets of all budgets, and univariate TPE (docs/front-quality.md). A trial
    that paused or was pruned at a rung contributes its regret there, relative to the best trial
    that reached the rung. The first trial with a budget takes the `middle` of every distribution,
    because other trials start from it.

    Args:
        base: a sampler for one objective.
        history: the observations of the study.
        budget: index of the next trial's budget.
        space: distributions of all parameters, including the budget.
        trials: all current trials of the study, ordered by number.
    """

    def __init__(
        self,
        base: BaseSampler,
        *,
        history: History,
        budget: int,
        space: Mapping[str, BaseDistribution],
        trials: Sequence[FrozenTrial],
    ) -> None:
        """Store the arguments; the proposal is made when the first parameter is sampled."""
        self._base, self._history, self._budget = base, history, budget
        self._space, self._trials = dict(space), trials
        self._proposed: dict[str, Any] | None = None

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return an empty space: `sample_independent` proposes all parameters together."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return an empty mapping; see `infer_relative_search_space`.

        Args:
            study: the study.
            trial: the trial that is being sampled.
            search_space: the empty space.

        Returns:
            An empty mapping.
        """
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return one parameter of the proposal, which is made on the first call.

        Args:
            study: the study.
            trial: the trial that is being sampled.
            param_name: name of the parameter.
            param_distribution: its distribution, which is also in `space`.

        Returns:
            The proposed value.
        """
        if self._proposed is None:
            others = [t for t in self._history.update(self._trials) if t.number != trial.number]
            self._proposed = self._propose(others)
        return self._proposed[param_name]

    def _propose(self, others: Sequence[FrozenTrial]) -> dict[str, Any]:
        """Propose parameters from the history and the other unfinished trials."""
        history, key = self._history, self._history.key
        served = history.budgets | {t.params[key] for t in others if key in t.params}
        if self._budget not in served:
            middles = {name: middle(form) for name, form in self._space.items()}
            return {**middles, key: self._budget}
        paused = [found for trial in others if (found := history.observe(trial))]
        best = dict(history.best)
        for observation in paused:
            history.raise_best(best, observation)
        observed = self.regrets(self._nearest(paused), best)
        shown: list[tuple[float | None, FrozenTrial]] = [*_bounded(observed)]
        numbers = {observation.number for observation in paused}
        running = [t for t in others if t.state is TrialState.RUNNING and t.number not in numbers]
        shown += [(None, trial) for trial in running[-MAX_OBSERVATIONS:]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler = PartialFixedSampler({key: self._budget}, self._base)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for value, trial in shown:
            # Users may enqueue trials with values from another space.
            with contextlib.suppress(KeyError, ValueError, TypeError):
                study.add_trial(self._copy(trial, value))
        return study.ask(self._space).params

    @staticmethod
    def regrets(
        observations: Sequence[Observation], best: Mapping[tuple[int, int], float]
    ) -> list[tuple[float, FrozenTrial]]:
        """Return pairs of the negated regret at a trial's last level and the trial itself.

        A negated regret is at most 0; it is minus infinity if the metric was not finite.

        Args:
            observations: the measurements of the trials.
            best: the best metric, by budget and level.
        """
        found = []
        for _, budget, levels, trial in observations:
            negated = levels[-1] - best[budget, len(levels) - 1]
            found.append((negated if negated <= 0 else float("-inf"), trial))
        return found

    def _nearest(self, paused: Sequence[Observation]) -> list[Observation]:
        """Return the observations of the nearest budgets, at least `MIN_OBSERVATIONS` if possible.

        The result is ordered by trial number and includes the observations of paused trials.
        """
        known = {budget: list(own) for budget, own in self._history.observations.items()}
        for observation in paused:
            known.setdefault(observation.budget, []).append(observation)
        found: list[Observation] = []
        farthest = -1
        for budget in sorted(known, key=lambda other: abs(other - self._budget)):
            distance = abs(budget - self._budget)
            if distance > farthest and len(found) >= MIN_OBSERVATIONS:
                break
            found, farthest = found + known[budget], distance
        return sorted(found, key=lambda observation: observation.number)

    def _copy(self, trial: FrozenTrial, value: float | None = None) -> FrozenTrial:
        """Return a copy of a trial: COMPLETE with `value`, or RUNNING if `value` is None."""
        now = datetime.datetime.now()
        return _ImmutableTrial(
            number=-1,
            trial_id=-1,
            state=TrialState.RUNNING if value is None else TrialState.COMPLETE,
            value=value,
            datetime_start=now,
            datetime_complete=None if value is None else now,
            params={name: trial.params[name] for name in self._space},
            distributions=self._space,
            user_attrs={},
            system_attrs={},
            intermediate_values={},
        )


class _ImmutableTrial(FrozenTrial):
    """A trial that is never modified, so studies need not deep-copy it."""

    def __deepcopy__(self, memo: Any) -> _ImmutableTrial:
        return copy.copy(self)


def _bounded(
    observed: Sequence[tuple[float, FrozenTrial]],
) -> Sequence[tuple[float, FrozenTrial]]:
    """Return at most `MAX_OBSERVATIONS`: half of them the best, half the newest of the rest.

    Without a limit, each proposal would take longer than the one before.
    """
    if len(observed) <= MAX_OBSERVATIONS:
        return observed
    by_value = sorted(range(len(observed)), key=lambda i: -observed[i][0])
    best = set(by_value[: MAX_OBSERVATIONS // 2])
    rest = [i for i in range(len(observed)) if i not in best]
    newest = rest[-(MAX_OBSERVATIONS - len(best)) :]
    return [observed[i] for i in sorted(best | set(newest))]
