"""The trials of a sweep: which one runs next, under what budget, from what, and how it ended.

Between the study, which remembers, and the strategy, which decides. What is decided is noted on
the trial before it starts, so that a driver which is built after a crash finds it there.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from nipq_search import blobs
from nipq_search.cost import COSTS
from nipq_search.errors import UserError
from nipq_search.search import jobs
from nipq_search.search.config.space import split
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.coordinator.resolved import Facts
from nipq_search.search.jobs import Job, committed, job_folder, model_file, rung_records
from nipq_search.search.strategies.expected_gain import Axes
from nipq_search.search.strategies.halving import Standing, to_promote
from nipq_search.search.strategies.pareto import default_reference, non_dominated
from nipq_search.search.strategies.samplers import RUNGS
from nipq_search.search.strategies.strategies import STRATEGIES, Finished, Seen, Target
from nipq_search.search.strategies.unseen_trials import News, is_foreign
from nipq_search.search.study.ledger import BUDGET, Asked, Ledger, Refused
from nipq_search.train.checkpoint import remove_checkpoints

TARGET = "budget_"
"""Begins the attributes that hold a trial's absolute targets."""

_FORGIVEN = 2
"""Failures after which a budget's further ones count as if it had been served."""

MOST = 500
"""Finished trials that a strategy is shown beside the front: asking must not get ever slower."""

RUNG = "rung"
"""Attribute: number of the rung at which a trial pauses next."""


def costs_of(trial: FrozenTrial) -> dict[str, float]:
    """Exact costs of a finished trial, from its attributes."""
    found = trial.user_attrs.items()
    return {k.removeprefix("cost_"): float(v) for k, v in found if k.startswith("cost_")}


def targets_of(trial: FrozenTrial) -> dict[str, float]:
    """Absolute targets that a trial was given, from its attributes; empty before that."""
    found = (
        (k.removeprefix(TARGET), v) for k, v in trial.user_attrs.items() if k.startswith(TARGET)
    )
    return {name: float(value) for name, value in found if name in COSTS}


def _number(trial: Finished) -> int:
    return trial.number


class Trials:
    """Proposes trials and tells how they ended; see the module.

    Args:
        config: the sweep.
        facts: graph and budgets.
        ledger: the study.
        out: the sweep's folder, absolute.
        make_job: a job of the sweep from kind, number and what else it has.
        enough: asked before a new trial is proposed; true once a limit is reached.
    """

    def __init__(
        self,
        *,
        config: SweepConfig,
        facts: Facts,
        ledger: Ledger,
        out: Path,
        make_job: Callable[..., Job],
        enough: Callable[[], bool],
    ) -> None:
        """Bind to a study; nothing is read or written before `reconcile`."""
        self.config, self.facts, self.ledger, self.out = config, facts, ledger, out
        self.make_job, self.enough = make_job, enough
        self.strategy = STRATEGIES[config.search.strategy]()
        self._sign = 1 if facts.mode == "max" else -1
        self._news = News()
        self._ended: list[Finished] = []
        self._front: list[Finished] = []
        self._asked: list[tuple[int, dict[str, float]]] = []
        self._assigned: list[int] = []
        self._failures: dict[int, int] = {}
        self.started: set[int] = set()
        self.open: list[int] = []

    def reconcile(self) -> None:
        """Tell the ledger what workers committed before this driver started.

        Running trials without a record become the first ones to resume.
        """
        for trial in self.ledger.trials(TrialState.PRUNED):
            remove_checkpoints(self._folder(trial.number) / "checkpoints")  # if a crash left them
        self.open = []
        for trial in self.ledger.trials(TrialState.RUNNING):
            if (record := committed(self._folder(trial.number))) is not None:
                self.tell(trial.number, record)
            elif self._is_paused(trial):
                self._teach(trial.number)
            else:
                self.open.append(trial.number)

    def _folder(self, number: int) -> Path:
        return job_folder(self.out, "trial", number)

    def left(self) -> int:
        """Trials that still have to run, as far as the configuration and the queue say."""
        trials = self.ledger.trials()
        waiting = sum(t.state is TrialState.WAITING for t in trials)
        asked = len(trials) - waiting
        running = sum(t.state is TrialState.RUNNING for t in trials)
        return running + max(waiting, self.config.search.trials - asked)

    def next(self) -> Job | None:
        """The next trial's job; None while there is none."""
        while True:
            try:
                job = self._next()
            except Refused as refused:
                self.ledger.fail(refused.number, str(refused), {})
                continue
            if job is not None:
                self.started.add(job.number)
            return job

    def ended(self, job: Job, record: Mapping[str, Any] | None) -> None:
        """A trial's job runs no more; without a record it stays open, or it is at a rung."""
        self.started.discard(job.number)
        if record is not None:
            self.tell(job.number, record)
        elif self._is_paused(self.ledger.trial(job.number)):
            self._teach(job.number)
        elif job.number not in self.open:
            self.open.append(job.number)

    # What runs next

    def _next(self) -> Job | None:
        budgets = len(self.facts.budgets)
        if self.open:
            number = self.open.pop(0)
            before = self.ledger.trial(number)
            open_ = self._learn(self.ledger.trials())
            target = self._target([t for t in open_ if t.number != number])
            asked = self.ledger.resume(number, target.budget, budgets)
            if "parent" in before.user_attrs:  # it is noted last, after all targets
                return self._job(asked, targets_of(before))
            # Cut off right after it was proposed: decided again, from what was known then.
            own = asked.enqueued or asked.budget != target.budget
            return self._job(asked, {} if own else target.targets)
        more = not self.enough()
        if more and (promoted := self._promoted(last=False)) is not None:
            return self._resumed(promoted)
        # What is pruned because nothing waits must not be pruned by yesterday's news.
        trials = self.ledger.trials() if self.strategy.rungs else self.ledger.look()
        open_ = self._learn(trials)
        waiting = any(t.state is TrialState.WAITING for t in open_)
        if more and (waiting or len(trials) < self.config.search.trials):
            target = self._target(open_)
            asked = self.ledger.ask(target.budget, budgets, trials)
            own = asked.enqueued or asked.budget != target.budget
            return self._job(asked, {} if own else target.targets)
        if more and not self.started:
            if (promoted := self._promoted(last=True)) is not None:
                return self._resumed(promoted)
            self._prune()
        return None

    def _target(self, open_: Sequence[FrozenTrial]) -> Target:
        """What the strategy wants next, from what has finished and these trials."""
        seen = Seen(
            budgets=[budget.targets for budget in self.facts.budgets],
            assigned=[*self._assigned, *(t.params[BUDGET] for t in open_ if BUDGET in t.params)],
            running=[targets_of(t) for t in open_ if t.state is TrialState.RUNNING],
            asked=[*(targets for _, targets in self._asked[-MOST:]), *map(targets_of, open_)],
            finished=self._finished(),
            axes=self._axes(),
        )
        return self.strategy.target(seen)

    def _learn(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Take in what has finished, and give the others."""
        others, new = [], []
        for trial in self._news.of(trials):
            if not trial.state.is_finished():
                others.append(trial)
                continue
            if is_foreign(trial):
                continue
            bisect.insort(self._asked, (trial.number, targets_of(trial)), key=lambda a: a[0])
            failed = trial.state is TrialState.FAIL
            if (index := trial.params.get(BUDGET)) is not None:
                self._failures[index] = self._failures.get(index, 0) + failed
                if not failed or self._failures[index] > _FORGIVEN:
                    self._assigned.append(int(index))
            if trial.state is TrialState.COMPLETE:
                new.append(
                    Finished(
                        number=trial.number,
                        metric=self._sign * trial.values[0],
                        cost=costs_of(trial),
                        targets=targets_of(trial),
                    )
                )
        if new:
            for ended in new:
                bisect.insort(self._ended, ended, key=_number)
            rivals = {t.number: t for t in [*self._front, *new]}
            cost = self.facts.front_cost
            points = {n: (t.metric, t.cost[cost]) for n, t in rivals.items() if cost in t.cost}
            self._front = [rivals[number] for number in sorted(non_dominated(points, "max"))]
        return others

    def _finished(self) -> list[Finished]:
        """What the strategy is shown: the newest `MOST`, and of the rest the front."""
        newest = self._ended[-MOST:]
        return [*(t for t in self._front if t.number < newest[0].number), *newest]

    def _axes(self) -> Axes | None:
        record = committed(job_folder(self.out, "float", 0)) or {}
        best = record.get("metrics", {}).get(self.facts.metric)
        if best is None:
            return None
        given = self.config.search.reference
        reference = default_reference(best, self.facts.mode) if given is None else given
        least, most = self.facts.axis
        return Axes(
            cost=self.facts.front_cost,
            least=least,
            most=min(most, self.facts.costs[self.facts.front_cost]["greatest"]),
            reference=self._sign * reference,
            best=self._sign * best,
        )

    def _job(self, asked: Asked, targets: Mapping[str, float]) -> Job:
        """The job of a trial; `targets` in place of its budget's, if any."""
        if not 0 <= asked.budget < len(self.facts.budgets):
            last = len(self.facts.budgets) - 1
            raise Refused(asked.number, f"budget: index {asked.budget} is not one of 0..{last}")
        try:
            self.config.train.with_hyperparameters(split(asked.params)[0])
        except UserError as error:
            raise Refused(asked.number, str(error)) from error
        budget = self.facts.budgets[asked.budget]
        label = budget.label
        if targets and dict(targets) != dict(budget.targets):
            label = ", ".join(f"{name}: {target:,.0f}" for name, target in targets.items())
        targets = dict(targets or budget.targets)
        known = self.ledger.trial(asked.number).user_attrs
        parent = self._parent(known, targets)
        job = self.make_job(
            "trial",
            asked.number,
            params=dict(asked.params),
            budget=targets,
            parent=parent,
            epochs_share=self._share(targets, parent),
            rung=int(known.get(RUNG, 0)),
        )
        self.ledger.note(
            asked.number,
            {
                **{f"{TARGET}{name}": target for name, target in targets.items()},
                "budget": label,
                "strategy": self.config.search.strategy,
                "seed": job.seed,
                "parent": job.parent,
            },
        )
        return job

    def _parent(self, known: Mapping[str, Any], budget: Mapping[str, float]) -> int | None:
        """The trial that a new one starts from; of a resumed one, what was decided before.

        Where that one's model is gone, as in a new folder, the trial begins anew, from another.
        """
        noted = known.get("parent")
        if "parent" in known and noted is None:
            return None
        if noted is not None and blobs.can_be_read(model_file(self._folder(int(noted)))):
            return int(noted)
        finished, gone = self._finished(), set[int]()
        while True:
            usable = [t for t in finished if budget.keys() <= t.cost.keys()]
            parent = self.strategy.parent(budget, usable)
            if parent is None or blobs.can_be_read(model_file(self._folder(parent))):
                return parent
            gone.add(parent)  # `gc` freed its model, and it chose among all trials
            finished = [t for t in self._ended if t.number not in gone]

    def _share(self, budget: Mapping[str, float], parent: int | None) -> float:
        at = 0 if parent is None else bisect.bisect_left(self._ended, parent, key=_number)
        own = [trial for trial in self._ended[at : at + 1] if trial.number == parent]
        return self.strategy.epochs_share(budget, own[0] if own else None)

    # Rungs

    def _is_paused(self, trial: FrozenTrial) -> bool:
        """Whether a running trial has reached its rung and waits for a decision."""
        rung = int(trial.user_attrs.get(RUNG, 0))
        return len(rung_records(self._folder(trial.number))) > rung < len(self.strategy.rungs)

    def _teach(self, number: int) -> None:
        """Note what a paused trial measured, for the sampler."""
        metrics = [
            rung["metrics"].get(self.facts.metric) for rung in rung_records(self._folder(number))
        ]
        self.ledger.note(number, {RUNGS: metrics})

    def _standings(self) -> list[Standing]:
        """Every trial that reached a rung, rebuilt from what workers wrote."""
        found = []
        living = (TrialState.RUNNING, TrialState.PRUNED, TrialState.COMPLETE)
        for trial in self.ledger.trials(*living):
            measured = rung_records(self._folder(trial.number)) if self.strategy.rungs else []
            if measured and BUDGET in trial.params:
                running = trial.state is TrialState.RUNNING
                found.append(
                    Standing(
                        number=trial.number,
                        bracket=int(trial.params[BUDGET]),
                        metrics=[self._ranked(rung["metrics"]) for rung in measured],
                        paused=running and self._is_paused(trial),
                        pruned=trial.state is TrialState.PRUNED,
                    )
                )
        return found

    def _ranked(self, metrics: Mapping[str, float]) -> float:
        """The metric, the greater the better; one that was no number is the worst."""
        if self.facts.metric not in metrics:
            return float("-inf")
        return self._sign * metrics[self.facts.metric]

    def _promoted(self, last: bool) -> int | None:
        return to_promote(self._standings(), last) if self.strategy.rungs else None

    def _resumed(self, number: int) -> Job:
        """A paused trial goes on to its next rung; noted first, for it may be cut off."""
        self._learn(self.ledger.trials())
        trial = self.ledger.trial(number)
        self.ledger.note(number, {RUNG: int(trial.user_attrs.get(RUNG, 0)) + 1})
        asked = self.ledger.resume(number, int(trial.params[BUDGET]), len(self.facts.budgets))
        return self._job(asked, targets_of(trial))

    def _prune(self) -> None:
        """No trial will come that could help the paused ones: tell them PRUNED."""
        for standing in self._standings():
            if standing.paused:
                folder = self._folder(standing.number)
                metric = self._sign * standing.metrics[-1]
                attributes = {
                    "samples": jobs.samples_processed(folder),
                    "seconds": jobs.seconds_spent(folder),
                    "attempts": len(jobs.attempts(folder)),
                    "ended": time.time(),
                    "reason": f"{self.facts.metric} {metric:.4f} at rung "
                    f"{len(standing.metrics) - 1} was not among the best of its budget",
                }
                self.ledger.prune(standing.number, attributes)
                remove_checkpoints(folder / "checkpoints")

    # Ends

    def tell(self, number: int, record: Mapping[str, Any]) -> None:
        """Attributes, constraint and state of a trial, from its record alone."""
        own = ("samples", "seconds", "attempts", "seed", "threads", "ended")
        attributes = {key: record[key] for key in own if key in record}
        reason = record.get("reason")
        metric = record.get("metrics", {}).get(self.facts.metric)
        if record["state"] == jobs.COMPLETE and metric is None:
            reason = f"evaluate() returned no '{self.facts.metric}'"
        elif record["state"] == jobs.COMPLETE and metric != metric:
            reason = f"the validation {self.facts.metric} is NaN"
        if reason is not None:
            self.ledger.fail(number, reason, attributes)
            return
        cost, budget = record["cost"], record["budget"]
        attributes |= {f"cost_{name}": value for name, value in cost.items()}
        attributes |= {f"validation_{k}": v for k, v in record["metrics"].items() if v == v}
        slack = max(cost[name] / target for name, target in budget.items()) - 1
        values = (metric, cost[self.facts.front_cost])
        self.ledger.complete(number, values, attributes, slack)
