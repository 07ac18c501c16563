"""The ledger: the Optuna study, which stores every decision of a sweep.

Only the driver writes to the study. In the life cycle of a trial, `ask` creates the trial
(RUNNING), a worker writes its result record, and the driver sets its attributes and constraint and
then calls `tell` (COMPLETE, FAIL or PRUNED). After a crash between any two of these steps, the
next driver carries out the remaining ones: no trial is finished twice, and running trials keep
their numbers.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import PartialFixedSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from nipq_search.search.strategies.samplers import SAMPLERS, History, RegretSampler
from nipq_search.search.study.journal import free_journal, mend_journal
from nipq_search.search.study.proposals import Proposal, RejectedTrial, suggest
from nipq_search.search.study.retry import retry_outages
from nipq_search.search.study.storage import (
    JOURNAL,
    close_storage,
    load_study,
    open_storage,
    storage_url,
)
from nipq_search.train.loop import seed_for

BUDGET = "budget"
"""Name of the parameter that holds the index of a trial's budget."""

CONSTRAINT = "budget"
"""Name of the Optuna constraint that requires a trial to stay within its budget."""

SLACK = "budget_slack"
"""Attribute with the largest value of cost / target - 1; the name is no cost's."""
_FIXED = "fixed_params"
"""System attribute in which Optuna stores the parameters that a trial was enqueued with."""

_FRESH_SECONDS = 0.5
"""Seconds for which `look` returns the same list of trials."""


def _enqueued_budget(trial: FrozenTrial, default: int, budgets: int) -> int:
    """Return the budget index of an enqueued trial, or the default if it has no usable one."""
    wanted = trial.system_attrs.get(_FIXED, {}).get(BUDGET, default)
    usable = isinstance(wanted, (int, float)) and 0 <= wanted < budgets
    return int(wanted) if usable else default


class Ledger:
    """The study of a sweep; the module docstring describes the life cycle of a trial.

    Args:
        study: the Optuna study.
        space: distribution of each hyperparameter.
        sampler: name of the sampler.
        seed: the sweep's seed.
        storage: the study's storage, which `close` closes.
        journal: the study's journal file, which `close` repairs; None for a database.
        guard: called before trials and attributes are written; raises once this process must
            stop writing.
    """

    def __init__(
        self,
        study: optuna.Study,
        *,
        space: Mapping[str, BaseDistribution],
        sampler: str,
        seed: int,
        storage: BaseStorage | None = None,
        journal: Path | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """Wrap a study; nothing is written."""
        self._storage, self._journal, self.guard = storage, journal, guard
        self.study, self.space, self.sampler, self.seed = study, space, sampler, seed
        self._history = History(BUDGET, 1 if self.mode == "max" else -1)
        self._cached: list[FrozenTrial] | None = None
        self._cached_at = 0.0

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
        guard: Callable[[], None] = lambda: None,
    ) -> Ledger:
        """Create or load the study, after repairing its journal.

        Args:
            folder: the sweep's folder.
            name: name of the study.
            mode: direction of the metric, `max` or `min`, in a new study; the cost is minimized.
            space: distribution of each hyperparameter.
            sampler: name of the sampler.
            seed: the sweep's seed.
            guard: see `Ledger`.

        Returns:
            The ledger.

        Raises:
            UserError: the study's storage is unreachable, or its journal is damaged.
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
        return cls(
            study,
            space=space,
            sampler=sampler,
            seed=seed,
            storage=storage,
            journal=folder / JOURNAL if storage_url() is None else None,
            guard=guard,
        )

    def close(self) -> None:
        """Close the storage; the ledger cannot be used afterwards.

        An incomplete last line, which a full disk can leave in the journal, is removed before
        other programs append to the journal.
        """
        if self._journal is not None:
            mend_journal(self._journal)
        if self._storage is not None:
            close_storage(self._storage)

    @classmethod
    def load(cls, folder: Path, name: str, identity: str | None = None) -> Ledger:
        """Load an existing study for reading.

        Args:
            folder: the sweep's folder.
            name: name of the study.
            identity: identity of the study with which the folder was created; None if unknown.

        Returns:
            A ledger without a search space, which must not propose trials.

        Raises:
            UserError: the study does not exist or does not belong to the folder; see
                `load_study`.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study, storage = load_study(folder, name, identity)
        return cls(study, space={}, sampler="random", seed=0, storage=storage)

    def remember(self, key: str, value: Any) -> None:
        """Store a JSON value as an attribute of the study, unless it already has this value."""
        self._before_write()
        text = json.dumps(value, sort_keys=True)
        if self.study.user_attrs.get(key) != text:
            self.study.set_user_attr(key, text)

    def recall(self, key: str) -> Any:
        """Return the value that `remember` stored under a key, or None."""
        text = self.study.user_attrs.get(key)
        return None if text is None else json.loads(text)

    @property
    def mode(self) -> str:
        """Direction of the metric for which the study was created, `max` or `min`."""
        return "max" if self.study.directions[0] is optuna.study.StudyDirection.MAXIMIZE else "min"

    @retry_outages
    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials in these states (default: all), ordered by number."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def cached_trials(self) -> list[FrozenTrial]:
        """Return all trials; the list is cached for `_FRESH_SECONDS`, because reading is slow.

        Writing to the study through this object invalidates the cache.
        """
        if self._cached is None or time.monotonic() - self._cached_at > _FRESH_SECONDS:
            self._cached, self._cached_at = self.trials(), time.monotonic()
        return self._cached

    def _before_write(self) -> None:
        """Invalidate the cache and check that this process may write."""
        self._cached = None
        self.guard()

    @retry_outages
    def trial(self, number: int) -> FrozenTrial:
        """Return one trial without loading the others.

        Raises:
            KeyError: no trial has this number.
        """
        # `Study` has no public method for a single trial.
        storage = self.study._storage
        own = storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)
        return storage.get_trial(own)

    def name_metrics(self, metric: str, cost: str) -> None:
        """Name the objectives for the `optuna` command and its dashboard."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            if self.study.metric_names != [metric, cost]:
                self.study.set_metric_names([metric, cost])

    def ask(
        self, budget: int, budgets: int, trials: Sequence[FrozenTrial] | None = None
    ) -> Proposal:
        """Take the next waiting trial or, if there is none, propose one for the given budget.

        The sampler's seed depends on the trial's number, so a resumed search repeats no proposal,
        and its proposals do not depend on where it was interrupted.

        Args:
            budget: index of the budget.
            budgets: number of budgets.
            trials: all trials of the study, if the caller has already read them.

        Returns:
            The trial; if a user enqueued it, it may have another budget.

        Raises:
            RejectedTrial: the waiting trial has unusable values.
        """
        self._before_write()
        # `study.ask` takes the first waiting trial, which may have been enqueued just now.
        trials = self.trials() if trials is None else trials
        self._use_sampler(budget, len(trials), budgets, trials)
        trial = self.study.ask()
        if _FIXED in (frozen := self.trial(trial.number)).system_attrs:
            budget = _enqueued_budget(frozen, budget, budgets)
            self._use_sampler(budget, trial.number, budgets, trials)
        return self._suggest(trial, budgets)

    @retry_outages
    def resume(self, number: int, budget: int, budgets: int) -> Proposal:
        """Return a RUNNING trial, after proposing any parameters that it lacks.

        Args:
            number: trial number.
            budget: index of the budget to propose for if the trial has none yet.
            budgets: number of budgets.

        Returns:
            The trial with all parameters.

        Raises:
            RejectedTrial: the trial was enqueued with unusable values.
        """
        self._before_write()
        trials = self.trials()
        frozen = trials[number]
        self._use_sampler(int(frozen.params.get(BUDGET, budget)), number, budgets, trials)
        # A frozen trial has no public attribute for its ID in the storage.
        trial = optuna.trial.Trial(self.study, frozen._trial_id)
        return self._suggest(trial, budgets)

    def _use_sampler(
        self, budget: int, number: int, budgets: int, trials: Sequence[FrozenTrial]
    ) -> None:
        factory = SAMPLERS[self.sampler]
        base = factory(seed_for(self.seed, number, 1))
        if factory.learns_by_regret:
            self.study.sampler = RegretSampler(
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

    def _suggest(self, trial: optuna.trial.Trial, budgets: int) -> Proposal:
        wanted = self._space(budgets)
        params = dict(trial.params)
        for name, distribution in wanted.items():
            if name not in params:
                try:
                    params[name] = suggest(trial, name, distribution)
                except (ValueError, TypeError) as error:
                    raise RejectedTrial(trial.number, f"{name}: {error}") from error
        # Enqueued trials may have parameters that the sweep file does not contain; drop these.
        params = {name: params[name] for name in wanted}
        budget = int(params.pop(BUDGET))
        enqueued = _FIXED in self.trial(trial.number).system_attrs
        return Proposal(number=trial.number, budget=budget, params=params, enqueued=enqueued)

    @retry_outages
    def note(self, number: int, attributes: Mapping[str, Any]) -> None:
        """Set user attributes of an unfinished trial, except those that have the given value."""
        self._before_write()
        frozen = self.trial(number)
        # A frozen trial has no public attribute for its ID in the storage.
        trial = optuna.trial.Trial(self.study, frozen._trial_id)
        for key, value in attributes.items():
            if key not in frozen.user_attrs or frozen.user_attrs[key] != value:
                trial.set_user_attr(key, value)

    @retry_outages
    def complete(
        self,
        number: int,
        values: Sequence[float],
        attributes: Mapping[str, Any],
        slack: float,
    ) -> None:
        """Set the attributes and the constraint of a trial, then mark it as COMPLETE; idempotent.

        Args:
            number: trial number.
            values: metric and front cost.
            attributes: user attributes.
            slack: largest value of cost / target - 1; at most 0 if the trial is within its budget.
        """
        frozen = self.trial(number)
        if frozen.state.is_finished():
            return
        self.note(number, {**attributes, SLACK: slack})
        if CONSTRAINT not in frozen.constraints:
            # A frozen trial has no public attribute for its ID in the storage.
            optuna.trial.Trial(self.study, frozen._trial_id).set_constraint(CONSTRAINT, slack)
        self._before_write()
        self.study.tell(number, values=list(values), skip_if_finished=True)

    def fail(self, number: int, reason: str, attributes: Mapping[str, Any]) -> None:
        """Store the reason and the attributes of a failed trial, then mark it as FAIL; idempotent.

        Args:
            number: trial number.
            reason: why the trial failed.
            attributes: further user attributes.
        """
        self._end(number, TrialState.FAIL, {**attributes, "reason": reason})

    def prune(self, number: int, attributes: Mapping[str, Any]) -> None:
        """Store the attributes of a trial, then mark it as PRUNED; idempotent."""
        self._end(number, TrialState.PRUNED, attributes)

    @retry_outages
    def _end(self, number: int, state: TrialState, attributes: Mapping[str, Any]) -> None:
        if self.trial(number).state.is_finished():
            return
        self.note(number, attributes)
        self._before_write()
        self.study.tell(number, state=state, skip_if_finished=True)
