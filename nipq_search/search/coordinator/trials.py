"""The trials of a sweep: which one runs next, its budget and parent, and how it ended.

`Trials` connects the study, which stores decisions, with the strategy, which makes them. Decisions
are stored in the trial's attributes before its job starts, so a driver started after a crash finds
them there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from nipq_search import blobs
from nipq_search.errors import UserError
from nipq_search.search import jobs
from nipq_search.search.config.space import split
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.coordinator.history import TARGET, TrialHistory, targets_of
from nipq_search.search.coordinator.resolved import ResolvedSweep
from nipq_search.search.jobs import Job, committed_record, job_folder, model_file, rung_records
from nipq_search.search.strategies.halving import Standing, to_promote
from nipq_search.search.strategies.samplers import RUNGS
from nipq_search.search.strategies.strategies import STRATEGIES, Assignment
from nipq_search.search.study.ledger import BUDGET, Ledger
from nipq_search.search.study.proposals import Proposal, RejectedTrial
from nipq_search.train.checkpoint import remove_checkpoints

RUNG = "rung"
"""Trial attribute: number of the rung at which the trial pauses next."""


class Trials:
    """Creates jobs of trials and enters their results into the ledger; call `reconcile` first.

    Args:
        config: the sweep configuration.
        resolved: the sweep's graph and budgets.
        ledger: the study.
        out: absolute path of the sweep's folder.
        make_job: returns a job from its kind, its number and further fields of `Job`.
        limit_reached: returns whether a limit forbids new trials; called before trials are
            proposed or promoted.

    Attributes:
        open: numbers of RUNNING trials without a job, which are resumed before any other starts.
        started: numbers of trials whose jobs `next` returned and that have not ended.
    """

    def __init__(
        self,
        *,
        config: SweepConfig,
        resolved: ResolvedSweep,
        ledger: Ledger,
        out: Path,
        make_job: Callable[..., Job],
        limit_reached: Callable[[], bool],
    ) -> None:
        """Store the arguments; `reconcile` is the first to read or write."""
        self.config, self.resolved, self.ledger, self.out = config, resolved, ledger, out
        self.make_job, self.limit_reached = make_job, limit_reached
        self.strategy = STRATEGIES[config.search.strategy]()
        self.history = TrialHistory(config, resolved, out)
        self.started: set[int] = set()
        self.open: list[int] = []

    def reconcile(self) -> None:
        """Enter into the ledger the results that workers committed before this driver started.

        RUNNING trials without a record stay paused or are queued to be resumed. Checkpoints that a
        crash left in the folders of PRUNED trials are deleted.
        """
        for trial in self.ledger.trials(TrialState.PRUNED):
            remove_checkpoints(self._folder(trial.number) / "checkpoints")  # left by a crash
        self.open = []
        for trial in self.ledger.trials(TrialState.RUNNING):
            if (record := committed_record(self._folder(trial.number))) is not None:
                self.tell(trial.number, record)
            else:
                self._keep_open(trial)

    def _folder(self, number: int) -> Path:
        return job_folder(self.out, "trial", number)

    def remaining(self) -> int:
        """Return the number of trials that are RUNNING, enqueued or still to be proposed."""
        trials = self.ledger.trials()
        waiting = sum(t.state is TrialState.WAITING for t in trials)
        asked = len(trials) - waiting
        running = sum(t.state is TrialState.RUNNING for t in trials)
        return running + max(waiting, self.config.search.trials - asked)

    def next(self) -> Job | None:
        """Take the job of the next trial to run, or return None if there is none at present.

        Enqueued trials with unusable values fail.
        """
        while True:
            try:
                job = self._next()
            except RejectedTrial as refused:
                self.ledger.fail(refused.number, str(refused), {})
                continue
            if job is not None:
                self.started.add(job.number)
            return job

    def ended(self, job: Job, record: Mapping[str, Any] | None) -> None:
        """Enter the record of a trial's job into the ledger; without one, keep the trial open."""
        self.started.discard(job.number)
        if record is not None:
            self.tell(job.number, record)
        else:
            self._keep_open(self.ledger.trial(job.number))

    def _keep_open(self, trial: FrozenTrial) -> None:
        """Store the rung metrics of a trial that is paused; queue any other one to be resumed."""
        if self._is_paused(trial):
            self._note_rung_metrics(trial.number)
        elif trial.number not in self.open:
            self.open.append(trial.number)

    # The next trial

    def _next(self) -> Job | None:
        """Return the job of the next trial: resumed, promoted or new; None if there is none.

        Once no other trial can start, paused trials that are not promoted are pruned.

        Raises:
            RejectedTrial: an enqueued trial has unusable values.
        """
        if self.open:
            return self._resume(self.open.pop(0))
        more = not self.limit_reached()
        if more and (promoted := self._to_promote(last=False)) is not None:
            return self._promote(promoted)
        # Pruning below relies on there being no waiting trial, so a cached list, which may lack
        # new trials, does not suffice.
        trials = self.ledger.trials() if self.strategy.rungs else self.ledger.cached_trials()
        unfinished = self.history.update(trials)
        waiting = any(t.state is TrialState.WAITING for t in unfinished)
        if more and (waiting or len(trials) < self.config.search.trials):
            return self._propose(unfinished, trials)
        if more and not self.started:
            if (promoted := self._to_promote(last=True)) is not None:
                return self._promote(promoted)
            self._prune()
        return None

    def _propose(self, unfinished: Sequence[FrozenTrial], trials: Sequence[FrozenTrial]) -> Job:
        """Return the job of a trial that is proposed now or was enqueued."""
        assignment = self.strategy.assign(self.history.state(unfinished))
        proposal = self.ledger.ask(assignment.budget, len(self.resolved.budgets), trials)
        return self._job(proposal, _targets_for(proposal, assignment))

    def _resume(self, number: int) -> Job:
        """Return the job that resumes a RUNNING trial."""
        before = self.ledger.trial(number)
        unfinished = self.history.update(self.ledger.trials())
        others = [t for t in unfinished if t.number != number]
        assignment = self.strategy.assign(self.history.state(others))
        proposal = self.ledger.resume(number, assignment.budget, len(self.resolved.budgets))
        if "parent" in before.user_attrs:  # stored last, so the targets are complete
            return self._job(proposal, targets_of(before))
        # The driver crashed right after the proposal: decide again, based on the same state.
        return self._job(proposal, _targets_for(proposal, assignment))

    def _job(self, proposal: Proposal, targets: Mapping[str, float]) -> Job:
        """Create the job of a trial, and store the decisions about it in the ledger.

        Args:
            proposal: the trial.
            targets: absolute targets that replace those of its budget; empty to keep them.

        Raises:
            RejectedTrial: an enqueued trial has unusable values.
        """
        if not 0 <= proposal.budget < len(self.resolved.budgets):
            last = len(self.resolved.budgets) - 1
            raise RejectedTrial(
                proposal.number, f"budget: index {proposal.budget} is not one of 0..{last}"
            )
        try:
            self.config.train.with_hyperparameters(split(proposal.params)[0])
        except UserError as error:
            raise RejectedTrial(proposal.number, str(error)) from error
        budget = self.resolved.budgets[proposal.budget]
        label = budget.label
        if targets and dict(targets) != dict(budget.targets):
            label = ", ".join(f"{name}: {target:,.0f}" for name, target in targets.items())
        targets = dict(targets or budget.targets)
        attributes = self.ledger.trial(proposal.number).user_attrs
        parent = self._parent(attributes, targets)
        job = self.make_job(
            "trial",
            proposal.number,
            params=dict(proposal.params),
            budget=targets,
            parent=parent,
            epochs_share=self._epochs_share(targets, parent),
            rung=int(attributes.get(RUNG, 0)),
        )
        self.ledger.note(
            proposal.number,
            {
                **{f"{TARGET}{name}": target for name, target in targets.items()},
                "budget": label,
                "strategy": self.config.search.strategy,
                "seed": job.seed,
                "parent": job.parent,
            },
        )
        return job

    def _parent(self, attributes: Mapping[str, Any], budget: Mapping[str, float]) -> int | None:
        """Return the parent that the strategy chooses; for a resumed trial, the stored one.

        If the model of the stored parent is missing, for example in a new folder, the trial starts
        over from another parent. The result is None if the trial starts from the float model.
        """
        noted = attributes.get("parent")
        if "parent" in attributes and noted is None:
            return None
        if noted is not None and blobs.can_be_read(model_file(self._folder(int(noted)))):
            return int(noted)
        finished, unreadable = self.history.recent(), set[int]()
        while True:
            usable = [t for t in finished if budget.keys() <= t.cost.keys()]
            parent = self.strategy.parent(budget, usable)
            if parent is None or blobs.can_be_read(model_file(self._folder(parent))):
                return parent
            # `gc` has deleted the model of this parent. It keeps the models of parents selected
            # from all trials, which can differ from those selected from the recent ones.
            unreadable.add(parent)
            finished = self.history.all_but(unreadable)

    def _epochs_share(self, budget: Mapping[str, float], parent: int | None) -> float:
        """Return the fraction of the epochs for which a trial with this parent trains."""
        found = None if parent is None else self.history.find(parent)
        return self.strategy.epochs_share(budget, found)

    # Rungs

    def _is_paused(self, trial: FrozenTrial) -> bool:
        """Return whether a RUNNING trial has reached its rung and awaits a decision."""
        rung = int(trial.user_attrs.get(RUNG, 0))
        return len(rung_records(self._folder(trial.number))) > rung < len(self.strategy.rungs)

    def _note_rung_metrics(self, number: int) -> None:
        """Store the rung metrics of a paused trial as an attribute, which the sampler reads."""
        records = rung_records(self._folder(number))
        metrics = [record["metrics"].get(self.resolved.metric) for record in records]
        self.ledger.note(number, {RUNGS: metrics})

    def _standings(self) -> list[Standing]:
        """Return the standing of every trial that reached a rung, from the workers' records."""
        found = []
        states = (TrialState.RUNNING, TrialState.PRUNED, TrialState.COMPLETE)
        for trial in self.ledger.trials(*states):
            measured = rung_records(self._folder(trial.number)) if self.strategy.rungs else []
            if measured and BUDGET in trial.params:
                running = trial.state is TrialState.RUNNING
                found.append(
                    Standing(
                        number=trial.number,
                        bracket=int(trial.params[BUDGET]),
                        metrics=[self.history.signed_metric(rung["metrics"]) for rung in measured],
                        paused=running and self._is_paused(trial),
                        pruned=trial.state is TrialState.PRUNED,
                    )
                )
        return found

    def _to_promote(self, last: bool) -> int | None:
        return to_promote(self._standings(), last) if self.strategy.rungs else None

    def _promote(self, number: int) -> Job:
        """Return the job that continues a paused trial to its next rung.

        The promotion is recorded first, so that it survives a crash.
        """
        self.history.update(self.ledger.trials())
        trial = self.ledger.trial(number)
        self.ledger.note(number, {RUNG: int(trial.user_attrs.get(RUNG, 0)) + 1})
        budgets = len(self.resolved.budgets)
        proposal = self.ledger.resume(number, int(trial.params[BUDGET]), budgets)
        return self._job(proposal, targets_of(trial))

    def _prune(self) -> None:
        """Prune all paused trials, because no further trial can lead to their promotion."""
        metric_name, sign = self.resolved.metric, 1 if self.resolved.mode == "max" else -1
        for standing in self._standings():
            if standing.paused:
                folder = self._folder(standing.number)
                metric = sign * standing.metrics[-1]
                attributes = {
                    "samples": jobs.samples_processed(folder),
                    "seconds": jobs.seconds_spent(folder),
                    "attempts": len(jobs.attempts(folder)),
                    "ended": time.time(),
                    "reason": f"{metric_name} {metric:.4f} at rung "
                    f"{len(standing.metrics) - 1} was not among the best for its budget",
                }
                self.ledger.prune(standing.number, attributes)
                remove_checkpoints(folder / "checkpoints")

    # Results

    def tell(self, number: int, record: Mapping[str, Any]) -> None:
        """Complete or fail a trial in the ledger, as its result record says.

        A COMPLETE record in which the task's metric is missing or NaN counts as a failure.
        """
        own = ("samples", "seconds", "attempts", "seed", "threads", "ended")
        attributes = {key: record[key] for key in own if key in record}
        reason = record.get("reason")
        metric = record.get("metrics", {}).get(self.resolved.metric)
        if record["state"] == jobs.COMPLETE and metric is None:
            reason = f"evaluate() returned no '{self.resolved.metric}'"
        elif record["state"] == jobs.COMPLETE and metric != metric:
            reason = f"the validation {self.resolved.metric} is NaN"
        if reason is not None:
            self.ledger.fail(number, reason, attributes)
            return
        cost, budget = record["cost"], record["budget"]
        attributes |= {f"cost_{name}": value for name, value in cost.items()}
        attributes |= {f"validation_{k}": v for k, v in record["metrics"].items() if v == v}
        slack = max(cost[name] / target for name, target in budget.items()) - 1
        values = (metric, cost[self.resolved.front_cost])
        self.ledger.complete(number, values, attributes, slack)


def _targets_for(proposal: Proposal, assignment: Assignment) -> Mapping[str, float]:
    """Return the assigned targets, or none if the trial was enqueued or has another budget."""
    if proposal.enqueued or proposal.budget != assignment.budget:
        return {}
    return assignment.targets
