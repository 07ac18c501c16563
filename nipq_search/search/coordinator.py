"""What runs next: the float model, baselines, trials, the test split. No clock, no processes.

The coordinator turns the ledger and the folders of finished jobs into the next job, and finished
jobs into the ledger. It knows nothing of Ray, so any executor can drive it, and a new one that is
built after a crash continues where the old one was.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from nipq_search.cost import COSTS
from nipq_search.errors import UserError
from nipq_search.search import jobs
from nipq_search.search.config import SweepConfig
from nipq_search.search.facts import Facts
from nipq_search.search.front import default_reference, non_dominated
from nipq_search.search.gaps import Axes
from nipq_search.search.jobs import SCORES, Job, committed, job_folder
from nipq_search.search.ledger import BUDGET, Asked, Ledger, Refused
from nipq_search.search.space import split
from nipq_search.search.strategy import STRATEGIES, Finished, Seen, Target
from nipq_search.search.worker import TEST_FILE
from nipq_search.storage import digest, read_sealed
from nipq_search.train.loop import seed_for
from nipq_search.train.trial import MODEL_FILE


def costs_of(trial: FrozenTrial) -> dict[str, float]:
    """Exact costs of a finished trial, from its attributes."""
    found = trial.user_attrs.items()
    return {k.removeprefix("cost_"): float(v) for k, v in found if k.startswith("cost_")}


TARGET = "budget_"
"""Begins the attributes that hold a trial's absolute targets."""


def targets_of(trial: FrozenTrial) -> dict[str, float]:
    """Absolute targets that a trial was given, from its attributes; empty before that."""
    found = (
        (k.removeprefix(TARGET), v) for k, v in trial.user_attrs.items() if k.startswith(TARGET)
    )
    return {name: float(value) for name, value in found if name in COSTS}


class Verdict(enum.Enum):
    """What an executor does when there is no next job."""

    WAIT = "wait"
    DONE = "done"


class Coordinator:
    """Decides what runs; see the module.

    Args:
        config: the sweep.
        facts: graph and budgets.
        ledger: the study.
        out: the sweep's folder, absolute.
        run: token of this driver's run.
        enough: asked before a new trial is proposed; true once a limit is reached.
        on_finished: called with a job whose result has been taken into the ledger.
    """

    def __init__(
        self,
        *,
        config: SweepConfig,
        facts: Facts,
        ledger: Ledger,
        out: Path,
        run: str,
        enough: Callable[[], bool] = lambda: False,
        on_finished: Callable[[Job], None] = lambda job: None,
    ) -> None:
        """Reconcile the ledger with what workers committed before a crash."""
        self.config, self.facts, self.ledger = config, facts, ledger
        self.out, self.run, self.enough, self.on_finished = out, run, enough, on_finished
        self.strategy = STRATEGIES[config.search.strategy]()
        self.document = config.as_json()
        if (file := self.document["float"]["checkpoint"]) is not None:
            # Ray's workers have a working directory of their own.
            self.document["float"]["checkpoint"] = str(Path(file).expanduser().absolute())
        self.running: dict[str, Job] = {}
        self.stopping = False
        self.failure: str | None = None
        self.tested = False
        self._lost: set[Path] = set()
        self._open = [t.number for t in ledger.trials(TrialState.RUNNING)]
        for number in list(self._open):
            if (record := committed(job_folder(out, "trial", number))) is not None:
                self._tell(number, record)
                self._open.remove(number)
        self._check_float(committed(job_folder(out, "float", 0)))
        self._check_scores(committed(job_folder(out, SCORES, 0)))

    def stop(self) -> None:
        """Start nothing more; running jobs save their state and stay open in the ledger."""
        self.stopping = True

    @property
    def stage(self) -> str:
        """What goes on, in words."""
        kinds = {job.kind for job in self.running.values()}
        for kind, name in (
            ("float", "float model"),
            (SCORES, "sensitivity scores"),
            ("baseline", "baselines"),
            ("test", "test split"),
        ):
            if kind in kinds and "trial" not in kinds:
                return name
        return "trials"

    def has_work(self) -> bool:
        """Whether there is anything to run, without taking it."""
        if self.stopping or self.failure:
            return False
        if any(self._state(*job) is None for job in [("float", 0), *self._before_trials()]):
            return True
        if self._open or (self.open_trials() > 0 and not self.enough()):
            return True
        return not self.tested and self._test_job() is not None

    def next_job(self) -> Job | Verdict:
        """The next job, or what to do without one."""
        if self.stopping or self.failure:
            return Verdict.DONE
        if "float" in self.running:  # even if its record is there: it may be a failure
            return Verdict.WAIT
        if self._state("float", 0) is None:
            return self._start(self._job("float", 0))
        for kind, number in self._before_trials():
            job = self._job(kind, number)
            if self._state(kind, number) is None and job.name not in self.running:
                return self._start(job)
        if SCORES in self.running:
            return Verdict.WAIT
        if (job_or_none := self._next_trial()) is not None:
            return self._start(job_or_none)
        if self.running:
            return Verdict.WAIT
        test = self._test_job()
        if test is None or self.tested:
            return Verdict.DONE
        self.tested = True
        return self._start(test)

    def finished(self, job: Job, lost: str | None = None) -> None:
        """Take a job's record into the ledger.

        Args:
            job: it runs no more.
            lost: why it ended without a record, unless it was asked to stop.
        """
        self.running.pop(job.name, None)
        record = committed(job.folder)
        if record is None and lost is not None:
            self._lost.add(job.folder)
            record = {"state": jobs.FAIL, "reason": lost}
        if record is None:
            if job.kind == "trial" and job.number not in self._open:
                self._open.append(job.number)
        elif job.kind == "trial":
            self._tell(job.number, record)
        elif job.kind == "float":
            self._check_float(record)
        elif job.kind == SCORES:
            self._check_scores(record)
        self.on_finished(job)

    def _check_float(self, record: Mapping[str, Any] | None) -> None:
        """Without the float model nothing can start, in this run or a later one."""
        if record is not None and record["state"] == jobs.FAIL:
            folder = job_folder(self.out, "float", 0)
            self.failure = (
                f"the float model failed: {record['reason']}; mend that, then remove {folder} "
                "to begin anew"
            )
        elif record is not None:
            file = job_folder(self.out, "float", 0) / MODEL_FILE
            if not file.is_file() or digest(file.read_bytes()) != record["model_sha256"]:
                self.failure = (
                    f"{file}: missing or damaged; remove {file.parent} and the same command "
                    "trains the float model again"
                )

    def _before_trials(self) -> list[tuple[str, int]]:
        """Kinds and numbers of the jobs between the float model and the trials."""
        scores = [(SCORES, 0)] if self.config.needs_scores else []
        return scores + [("baseline", bits) for bits in self.config.search.baselines]

    def _check_scores(self, record: Mapping[str, Any] | None) -> None:
        """Without the scores no trial can start."""
        if record is not None and record["state"] == jobs.FAIL:
            folder = job_folder(self.out, SCORES, 0)
            self.failure = (
                f"the sensitivity scores failed: {record['reason']}; mend that, then remove "
                f"{folder} to begin anew"
            )

    def halt(self, reason: str) -> None:
        """Start nothing more, for the machine is unfit; open trials stay open."""
        self.failure = self.failure or reason

    def open_trials(self) -> int:
        """Trials that still have to run, as far as the configuration and the queue say."""
        trials = self.ledger.trials()
        waiting = sum(t.state is TrialState.WAITING for t in trials)
        asked = len(trials) - waiting
        running = sum(t.state is TrialState.RUNNING for t in trials)
        return running + max(waiting, self.config.search.trials - asked)

    def _start(self, job: Job) -> Job:
        self.running[job.name] = job
        return job

    def _state(self, kind: str, number: int) -> str | None:
        folder = job_folder(self.out, kind, number)
        if (record := committed(folder)) is not None:
            return str(record["state"])
        return jobs.FAIL if folder in self._lost else None

    def _job(self, kind: str, number: int, **more: Any) -> Job:
        salt = {"float": 2, "baseline": 3, "trial": 4, "test": 5, SCORES: 6}[kind]
        return Job(
            kind=kind,
            number=number,
            out=str(self.out),
            config=self.document,
            run=self.run,
            seed=seed_for(self.config.seed, number, salt),
            **more,
        )

    def _target(self) -> Target:
        trials = self.ledger.trials()
        budgets = [budget.targets for budget in self.facts.budgets]
        assigned = [
            int(t.params[BUDGET])
            for t in trials
            if BUDGET in t.params and t.state is not TrialState.FAIL
        ]
        running = [targets_of(t) for t in trials if t.state is TrialState.RUNNING]
        return self.strategy.target(
            Seen(
                budgets=budgets,
                assigned=assigned,
                running=running,
                finished=self._finished(),
                axes=self._axes(),
            )
        )

    def _finished(self) -> list[Finished]:
        sign = 1 if self.facts.mode == "max" else -1
        return [
            Finished(number=trial.number, metric=sign * trial.values[0], cost=costs_of(trial))
            for trial in self.ledger.trials(TrialState.COMPLETE)
        ]

    def _axes(self) -> Axes | None:
        record = committed(job_folder(self.out, "float", 0)) or {}
        best = record.get("metrics", {}).get(self.facts.metric)
        if best is None:
            return None
        given = self.config.search.reference
        reference = default_reference(best, self.facts.mode) if given is None else given
        sign = 1 if self.facts.mode == "max" else -1
        least, most = self.facts.axis
        return Axes(
            cost=self.facts.front_cost,
            least=least,
            most=most,
            reference=sign * reference,
            best=sign * best,
        )

    def _next_trial(self) -> Job | None:
        while True:
            try:
                return self._next_asked()
            except Refused as refused:
                self.ledger.fail(refused.number, str(refused), {})

    def _next_asked(self) -> Job | None:
        budgets = len(self.facts.budgets)
        if self._open:
            number = self._open.pop(0)
            asked = self.ledger.resume(number, self._target().budget, budgets)
            before = self.ledger.trials()[number]
            # The parent is noted last: without it, not all of the targets may have been.
            return self._trial_job(
                asked, targets_of(before) if "parent" in before.user_attrs else {}
            )
        if self.enough():
            return None
        trials = self.ledger.trials()
        waiting = sum(t.state is TrialState.WAITING for t in trials)
        if not waiting and len(trials) >= self.config.search.trials:
            return None
        target = self._target()
        asked = self.ledger.ask(target.budget, budgets)
        return self._trial_job(asked, {} if waiting else target.targets)

    def _trial_job(self, asked: Asked, targets: Mapping[str, float]) -> Job:
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
        job = self._job(
            "trial",
            asked.number,
            params=dict(asked.params),
            budget=targets,
            parent=self._parent(asked.number, targets),
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

    def _parent(self, number: int, budget: Mapping[str, float]) -> int | None:
        """The trial that a new one starts from; of a resumed one, what was decided before."""
        known = self.ledger.trials()[number].user_attrs
        if "parent" in known:
            return None if known["parent"] is None else int(known["parent"])
        finished = [t for t in self._finished() if budget.keys() <= t.cost.keys()]
        return self.strategy.parent(budget, finished)

    def _tell(self, number: int, record: Mapping[str, Any]) -> None:
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

    def front(self) -> set[int]:
        """Numbers of the trials on the front."""
        complete = self.ledger.trials(TrialState.COMPLETE)
        points = {t.number: (t.values[0], t.values[1]) for t in complete}
        return non_dominated(points, self.facts.mode)

    def _test_job(self) -> Job | None:
        """A job for everything that is shown and has no test figure yet."""
        wanted = [self._job("float", 0)]
        wanted += [
            self._job("baseline", bits)
            for bits in self.config.search.baselines
            if self._state("baseline", bits) == jobs.COMPLETE
        ]
        for number in sorted(self.front()):
            record = committed(job_folder(self.out, "trial", number))
            if record is not None:
                wanted.append(
                    self._job("trial", number, params=record["params"], budget=record["budget"])
                )
        missing = [job for job in wanted if read_sealed(job.folder / TEST_FILE) is None]
        if not missing:
            return None
        return self._job("test", 0, jobs=tuple(job.as_json() for job in missing))
