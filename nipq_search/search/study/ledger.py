"""The ledger: the Optuna study, which holds every decision of a sweep.

Only the driver writes here. A trial's life: `ask` (RUNNING), a worker's result record, attributes
and constraint, `tell` (COMPLETE or FAIL). A crash between any two of them is mended by doing the
rest again: finished trials are never told twice, and running ones keep their number.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import PartialFixedSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from nipq_search.errors import UserError
from nipq_search.search.strategies.samplers import SAMPLERS, ByRegret, History
from nipq_search.search.study.journal import free_journal, mend_journal
from nipq_search.search.study.retry import patient
from nipq_search.search.study.storage import (
    JOURNAL,
    close_storage,
    load_study,
    open_storage,
    storage_url,
)
from nipq_search.train.loop import seed_for

BUDGET = "budget"
"""Name of the parameter that says which budget, by its index, a trial was given."""

CONSTRAINT = "budget"
_FIXED = "fixed_params"
"""Optuna's system attribute of trials that somebody enqueued."""

_FRESH_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A trial that was proposed, or that somebody enqueued.

    `budget` is the index of its budget.
    """

    number: int
    budget: int
    params: Mapping[str, Any]
    enqueued: bool = False


class Refused(UserError):
    """A trial that somebody enqueued with values that cannot be used."""

    def __init__(self, number: int, reason: str) -> None:
        """Say which trial, and why."""
        super().__init__(reason)
        self.number = number


def suggest(trial: optuna.trial.Trial, name: str, distribution: BaseDistribution) -> Any:
    """A parameter of a trial from its distribution, by Optuna's public calls."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def _enqueued_budget(trial: FrozenTrial, default: int, budgets: int) -> int:
    """The budget that somebody gave a waiting trial, if it can be used."""
    wanted = trial.system_attrs.get(_FIXED, {}).get(BUDGET, default)
    usable = isinstance(wanted, (int, float)) and 0 <= wanted < budgets
    return int(wanted) if usable else default


class Ledger:
    """A sweep's study. See the module for the life of a trial.

    Args:
        study: the Optuna study.
        space: distribution of each hyperparameter.
        sampler: name of the sampler.
        seed: the sweep's seed.

    Attributes:
        guard: called before anything is written; raises where this process must not.
    """

    def __init__(
        self,
        study: optuna.Study,
        *,
        space: Mapping[str, BaseDistribution],
        sampler: str,
        seed: int,
        storage: BaseStorage | None = None,
    ) -> None:
        """Wrap a study, and the storage that was opened for it."""
        self._storage = storage
        self.study, self.space, self.sampler, self.seed = study, space, sampler, seed
        self._history = History(BUDGET, 1 if self.mode == "max" else -1)
        self.guard: Callable[[], None] = lambda: None
        self._looked: list[FrozenTrial] | None = None
        self._looked_at = 0.0
        self._journal: Path | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        name: str,
        mode: str,
        *,
        space: Mapping[str, BaseDistribution],
        sampler: str,
        seed: int,
    ) -> Ledger:
        """Create the study or load it.

        Args:
            folder: the sweep's folder.
            name: the study's name.
            mode: `max` or `min`, of the metric; the cost is minimized.
            space: distribution of each hyperparameter.
            sampler: name of the sampler.
            seed: the sweep's seed.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if storage_url() is None:
            free_journal(folder / JOURNAL)
            mend_journal(folder / JOURNAL)
        storage = open_storage(folder)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=["maximize" if mode == "max" else "minimize", "minimize"],
            load_if_exists=True,
        )
        ledger = cls(study, space=space, sampler=sampler, seed=seed, storage=storage)
        ledger._journal = folder / JOURNAL if storage_url() is None else None
        return ledger

    def close(self) -> None:
        """End the connections of a study on a server; nothing can be read or written then.

        What a full disk tore of the journal's last line is cut off, before others write there.
        """
        if self._journal is not None:
            mend_journal(self._journal)
        if self._storage is not None:
            close_storage(self._storage)

    @classmethod
    def load(cls, folder: Path, name: str, identity: str | None = None) -> Ledger:
        """A study that is there already, to be read; it proposes nothing.

        Raises:
            UserError: there is none, or another one than the folder's; see `load_study`.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study, storage = load_study(folder, name, identity)
        return cls(study, space={}, sampler="random", seed=0, storage=storage)

    def remember(self, key: str, value: Any) -> None:
        """Store a fact of the sweep as an attribute of the study, if it changed."""
        self._changes()
        text = json.dumps(value, sort_keys=True)
        if self.study.user_attrs.get(key) != text:
            self.study.set_user_attr(key, text)

    def recall(self, key: str) -> Any:
        """A fact stored by `remember`, or None."""
        text = self.study.user_attrs.get(key)
        return None if text is None else json.loads(text)

    @property
    def mode(self) -> str:
        """`max` or `min`: the direction of the metric for which the study was made."""
        return "max" if self.study.directions[0] is optuna.study.StudyDirection.MAXIMIZE else "min"

    @patient
    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials in these states (default: all), by number."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def look(self) -> list[FrozenTrial]:
        """All trials, as they were just now if nothing was written since: thousands take time."""
        if self._looked is None or time.monotonic() - self._looked_at > _FRESH_SECONDS:
            self._looked, self._looked_at = self.trials(), time.monotonic()
        return self._looked

    def _changes(self) -> None:
        self._looked = None
        self.guard()  # before anything is written

    @patient
    def trial(self, number: int) -> FrozenTrial:
        """One trial, without going through all of them.

        Raises:
            KeyError: there is none of this number.
        """
        # `Study` itself hands out all of them or none.
        storage = self.study._storage
        own = storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)
        return storage.get_trial(own)

    def name_metrics(self, metric: str, cost: str) -> None:
        """Label the objectives for the `optuna` command and the dashboard."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            if self.study.metric_names != [metric, cost]:
                self.study.set_metric_names([metric, cost])

    def ask(self, budget: int, budgets: int, trials: Sequence[FrozenTrial] | None = None) -> Asked:
        """Take the next waiting trial, or propose one for the given budget.

        Args:
            budget: index of the budget.
            budgets: how many there are.
            trials: all trials, if they are known.

        Raises:
            Refused: the waiting trial has values that no sweep could use.
        """
        self._changes()
        # Seeded by the trial's number, so a resumed search neither repeats itself nor depends on
        # where it was cut.
        # `study.ask` takes the first waiting trial, perhaps one that came a moment ago.
        trials = self.trials() if trials is None else trials
        self._use_sampler(budget, len(trials), budgets, trials)
        trial = self.study.ask()
        if _FIXED in (frozen := self.trial(trial.number)).system_attrs:
            budget = _enqueued_budget(frozen, budget, budgets)
            self._use_sampler(budget, trial.number, budgets, trials)
        return self._suggest(trial, budgets)

    @patient
    def resume(self, number: int, budget: int, budgets: int) -> Asked:
        """A running trial again, with the parameters that it has; missing ones are proposed."""
        self._changes()
        trials = self.trials()
        frozen = trials[number]
        self._use_sampler(int(frozen.params.get(BUDGET, budget)), number, budgets, trials)
        trial = optuna.trial.Trial(self.study, frozen._trial_id)
        return self._suggest(trial, budgets)

    def _use_sampler(
        self, budget: int, number: int, budgets: int, trials: Sequence[FrozenTrial]
    ) -> None:
        factory = SAMPLERS[self.sampler]
        base = factory(seed_for(self.seed, number, 1))
        if factory.learns_by_regret:
            self.study.sampler = ByRegret(
                base,
                history=self._history,
                budget=budget,
                space=self._space(budgets),
                trials=trials,
            )
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self.study.sampler = PartialFixedSampler({BUDGET: budget}, base)

    def _space(self, budgets: int) -> dict[str, BaseDistribution]:
        return {BUDGET: IntDistribution(0, max(budgets - 1, 1)), **self.space}

    def _suggest(self, trial: optuna.trial.Trial, budgets: int) -> Asked:
        wanted = self._space(budgets)
        params = dict(trial.params)
        for name, distribution in wanted.items():
            if name not in params:
                try:
                    params[name] = suggest(trial, name, distribution)
                except (ValueError, TypeError) as error:
                    raise Refused(trial.number, f"{name}: {error}") from error
        # Somebody may have enqueued a trial with parameters that no sweep file names.
        params = {name: params[name] for name in wanted}
        budget = int(params.pop(BUDGET))
        enqueued = _FIXED in self.trial(trial.number).system_attrs
        return Asked(number=trial.number, budget=budget, params=params, enqueued=enqueued)

    @patient
    def note(self, number: int, attributes: Mapping[str, Any]) -> None:
        """Set user attributes of a trial that has not finished."""
        self._changes()
        frozen = self.trial(number)
        trial = optuna.trial.Trial(self.study, frozen._trial_id)
        for key, value in attributes.items():
            if key not in frozen.user_attrs or frozen.user_attrs[key] != value:
                trial.set_user_attr(key, value)

    @patient
    def complete(
        self,
        number: int,
        values: Sequence[float],
        attributes: Mapping[str, Any],
        slack: float,
    ) -> None:
        """Attributes and constraint first, then `tell` COMPLETE; harmless when repeated.

        Args:
            number: the trial.
            values: metric and front cost.
            attributes: user attributes.
            slack: largest cost / target - 1; at most 0 where the budget is kept.
        """
        frozen = self.trial(number)
        if frozen.state.is_finished():
            return
        self.note(number, {**attributes, "budget_slack": slack})
        if CONSTRAINT not in frozen.constraints:
            optuna.trial.Trial(self.study, frozen._trial_id).set_constraint(CONSTRAINT, slack)
        self._changes()
        self.study.tell(number, values=list(values), skip_if_finished=True)

    def fail(self, number: int, reason: str, attributes: Mapping[str, Any]) -> None:
        """Record why, then `tell` FAIL; harmless when repeated."""
        self._end(number, TrialState.FAIL, {**attributes, "reason": reason})

    def prune(self, number: int, attributes: Mapping[str, Any]) -> None:
        """Record attributes, then `tell` PRUNED; harmless when repeated."""
        self._end(number, TrialState.PRUNED, attributes)

    @patient
    def _end(self, number: int, state: TrialState, attributes: Mapping[str, Any]) -> None:
        if self.trial(number).state.is_finished():
            return
        self.note(number, attributes)
        self._changes()
        self.study.tell(number, state=state, skip_if_finished=True)
