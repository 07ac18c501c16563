"""Optuna's samplers by the names that sweep files use, and how they learn across budgets.

To add one, write a function from a seed to a sampler and register it in `SAMPLERS`; another
package offers an entry point instead.
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
from nipq_search.search.strategies.unseen_trials import News


@dataclass(frozen=True)
class SamplerFactory:
    """An entry of `SAMPLERS`: how to build a sampler, and what it learns from.

    Attributes:
        build: takes the seed of one trial and returns a sampler. A new sampler is built for every
            trial, so a resumed search neither repeats nor skips a proposal.
        learns_by_regret: whether the sampler has one objective, the regret within a budget (see
            `ByRegret`), instead of the metric and the cost.
    """

    build: Callable[[int], BaseSampler]
    learns_by_regret: bool = False

    def __call__(self, seed: int) -> BaseSampler:
        """Build a sampler."""
        return self.build(seed)


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


def _problem(name: str, value: Any) -> str | None:
    fits = isinstance(value, SamplerFactory)
    return None if fits else "not a nipq_search.search.strategies.samplers.SamplerFactory"


SAMPLERS: Registry[SamplerFactory] = Registry(
    "sampler", group="nipq_search.samplers", check=_problem
)
"""Samplers by the names that sweep files use."""

SAMPLERS.register("tpe", SamplerFactory(tpe, learns_by_regret=True))
SAMPLERS.register("random", SamplerFactory(random))
SAMPLERS.register("gp", SamplerFactory(gp, learns_by_regret=True))
SAMPLERS.register("nsga2", SamplerFactory(nsga2))

RUNGS = "rung_metrics"
"""Attribute of a trial: the metric at each rung so far, None where it was no number."""

MOST = 150
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


class Lesson(NamedTuple):
    """A trial and what it measured at each rung, then at its end, the greater the better."""

    number: int
    budget: int
    levels: Sequence[float]
    trial: FrozenTrial


class History:
    """What the trials of a study teach, kept from one question to the next.

    Args:
        key: name of the parameter that is the budget's index.
        sign: 1 where the metric is maximized, else -1.

    Attributes:
        lessons: of finished trials, by budget, in the order of their numbers.
        best: the most that was measured, by budget and level.
        budgets: those that a finished trial was given.
    """

    def __init__(self, key: str, sign: int) -> None:
        """Know nothing yet."""
        self.key, self._sign = key, sign
        self.lessons: dict[int, list[Lesson]] = {}
        self.best: dict[tuple[int, int], float] = {}
        self.budgets: set[int] = set()
        self._news = News()

    def learn(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Take in what has finished, of all trials by number, and give the others."""
        others = []
        for trial in self._news.of(trials):
            if not trial.state.is_finished():
                others.append(trial)
                continue
            if isinstance(trial.params.get(self.key), int):
                self.budgets.add(trial.params[self.key])
            if lesson := self.lesson(trial):
                own = self.lessons.setdefault(lesson.budget, [])
                bisect.insort(own, lesson, key=lambda other: other.number)
                self.raise_best(self.best, lesson)
        return others

    def lesson(self, trial: FrozenTrial) -> Lesson | None:
        """What a trial teaches, if anything."""
        # Somebody may add trials with values of any kind.
        if trial.state is TrialState.FAIL or not isinstance(trial.params.get(self.key), int):
            return None
        last = [trial.values[0]] if trial.state is TrialState.COMPLETE else []
        if not all(map(math.isfinite, last)):
            return None
        found = [*trial.user_attrs.get(RUNGS, []), *last]
        levels = [float("-inf") if m is None else self._sign * float(m) for m in found]
        budget = trial.params[self.key]
        return Lesson(trial.number, budget, levels, trial) if levels else None

    def raise_best(self, best: dict[tuple[int, int], float], lesson: Lesson) -> None:
        """Note in `best` where a lesson is better."""
        for level, metric in enumerate(lesson.levels):
            at = (lesson.budget, level)
            best[at] = max(best.get(at, float("-inf")), metric)


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
        history: what the study's trials teach.
        budget: index of the next trial's budget.
        space: distributions of every parameter, the budget's included.
        trials: the study's trials, by number, at the moment of the question.
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
        """Remember what to propose; nothing is sampled yet."""
        self._base, self._history, self._budget = base, history, budget
        self._space, self._trials = dict(space), trials
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
            others = [t for t in self._history.learn(self._trials) if t.number != trial.number]
            self._proposed = self._propose(others)
        return self._proposed[param_name]

    def _propose(self, others: Sequence[FrozenTrial]) -> dict[str, Any]:
        """Parameters, from the history and the trials that have not finished."""
        history, key = self._history, self._history.key
        given = history.budgets | {t.params[key] for t in others if key in t.params}
        if self._budget not in given:
            middles = {name: middle(form) for name, form in self._space.items()}
            return {**middles, key: self._budget}
        paused = [lesson for trial in others if (lesson := history.lesson(trial))]
        best = dict(history.best)
        for lesson in paused:
            history.raise_best(best, lesson)
        taught = self.regrets(self._nearest(paused), best)
        shown: list[tuple[float | None, FrozenTrial]] = [*_bounded(taught)]
        teaching = {lesson.number for lesson in paused}
        running = [t for t in others if t.state is TrialState.RUNNING and t.number not in teaching]
        shown += [(None, trial) for trial in running[-MOST:]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler = PartialFixedSampler({key: self._budget}, self._base)
        regrets = optuna.create_study(direction="maximize", sampler=sampler)
        for value, trial in shown:
            # Somebody may enqueue trials with values of another space.
            with contextlib.suppress(KeyError, ValueError, TypeError):
                regrets.add_trial(self._copy(trial, value))
        return regrets.ask(self._space).params

    @staticmethod
    def regrets(
        lessons: Sequence[Lesson], best: Mapping[tuple[int, int], float]
    ) -> list[tuple[float, FrozenTrial]]:
        """By how much each trial falls short, 0 at most; minus infinity where that is no number.

        Args:
            lessons: what trials measured.
            best: the most that was measured, by budget and level.
        """
        found = []
        for _, budget, levels, trial in lessons:
            regret = levels[-1] - best[budget, len(levels) - 1]
            found.append((regret if regret <= 0 else float("-inf"), trial))
        return found

    def _nearest(self, paused: Sequence[Lesson]) -> list[Lesson]:
        """Lessons of the nearest budgets, `ENOUGH` if there are so many, by number."""
        known = {budget: list(own) for budget, own in self._history.lessons.items()}
        for lesson in paused:
            known.setdefault(lesson.budget, []).append(lesson)
        found: list[Lesson] = []
        farthest = -1
        for budget in sorted(known, key=lambda other: abs(other - self._budget)):
            distance = abs(budget - self._budget)
            if distance > farthest and len(found) >= ENOUGH:
                break
            found, farthest = found + known[budget], distance
        return sorted(found, key=lambda lesson: lesson.number)

    def _copy(self, trial: FrozenTrial, value: float | None = None) -> FrozenTrial:
        """The trial with another value, or running."""
        now = datetime.datetime.now()
        return _Shown(
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


class _Shown(FrozenTrial):
    """A trial that nobody changes, so that a study need not copy it through and through."""

    def __deepcopy__(self, memo: Any) -> _Shown:
        return copy.copy(self)


def _bounded(
    shown: Sequence[tuple[float, FrozenTrial]],
) -> Sequence[tuple[float, FrozenTrial]]:
    """The best half of `MOST` and the newest of the rest: asking must not get ever slower."""
    if len(shown) <= MOST:
        return shown
    best = sorted(range(len(shown)), key=lambda i: -shown[i][0])[: MOST // 2]
    kept = set(best)
    newest = [i for i in range(len(shown)) if i not in kept][-(MOST - len(kept)) :]
    return [shown[i] for i in sorted(kept | set(newest))]
