"""The order of jobs: float model, sensitivity scores, baselines, trials, test split.

The coordinator derives the next job from the ledger and the folders of finished jobs, and enters
finished trials into the ledger. It starts no processes and does not use Ray, so any executor can
drive it. A coordinator created after a crash continues where the previous one stopped.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from nipq_search import blobs
from nipq_search.file_io import read_sealed
from nipq_search.search import jobs
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.coordinator.resolved import ResolvedSweep
from nipq_search.search.coordinator.trials import Trials
from nipq_search.search.jobs import SCORES, TEST_FILE, Job, committed_record, job_folder
from nipq_search.search.strategies.pareto import non_dominated
from nipq_search.search.strategies.unseen_trials import is_foreign
from nipq_search.search.study.ledger import Ledger
from nipq_search.train.loop import seed_for

_SALTS = {"float": 2, "baseline": 3, "trial": 4, "test": 5, SCORES: 6}
"""Salts that give the jobs of each kind their own seeds."""

_STAGES = (
    ("float", "float model"),
    (SCORES, "sensitivity scores"),
    ("baseline", "baselines"),
    ("test", "test split"),
)


class Verdict(enum.Enum):
    """What an executor does if there is no next job."""

    WAIT = "wait"
    DONE = "done"


class Coordinator:
    """Decides which job runs next. Call `reconcile` before anything else.

    Args:
        config: the sweep configuration.
        resolved: the sweep's graph and budgets.
        ledger: the study.
        out: absolute path of the sweep's folder.
        run: token of this driver's run.
        limit_reached: returns whether a limit forbids new trials; called before trials are
            proposed or promoted.
        on_finished: called by `finished` with the job, after the ledger has been updated.

    Attributes:
        running: jobs that an executor is running, by name.
        stopping: whether no further job may start because a stop was requested.
        failure: why the sweep cannot continue, or None.
    """

    def __init__(
        self,
        *,
        config: SweepConfig,
        resolved: ResolvedSweep,
        ledger: Ledger,
        out: Path,
        run: str,
        limit_reached: Callable[[], bool] = lambda: False,
        on_finished: Callable[[Job], None] = lambda job: None,
    ) -> None:
        """Bind to a study; nothing is read or written before `reconcile`."""
        self.config, self.resolved, self.ledger = config, resolved, ledger
        self.out, self.run = out, run
        self.limit_reached, self.on_finished = limit_reached, on_finished
        self.document = config.as_json()
        if (file := self.document["float"]["checkpoint"]) is not None:
            # Ray workers run in a different working directory.
            self.document["float"]["checkpoint"] = str(Path(file).expanduser().absolute())
        self.running: dict[str, Job] = {}
        self.stopping = False
        self.failure: str | None = None
        self._tested = False
        self._lost: set[Path] = set()
        self.trials = Trials(
            config=config,
            resolved=resolved,
            ledger=ledger,
            out=out,
            make_job=self._job,
            limit_reached=limit_reached,
        )

    def reconcile(self) -> None:
        """Take over the results that workers committed before this driver started.

        Results of trials are entered into the ledger. A failed job or a damaged model on which all
        trials depend sets `failure`.
        """
        self.trials.reconcile()
        self._check_float(committed_record(job_folder(self.out, "float", 0)))
        self._check_scores(committed_record(job_folder(self.out, SCORES, 0)))

    def stop(self) -> None:
        """Start no further jobs; this does not stop the jobs that are running."""
        self.stopping = True

    def halt(self, reason: str) -> None:
        """Start no further jobs, because they could not succeed here; open trials stay open.

        The reason becomes `failure`, unless there is an earlier one.
        """
        self.failure = self.failure or reason

    @property
    def stage(self) -> str:
        """Name of the sweep's stage; `trials` if a trial is running, or if nothing is running."""
        kinds = {job.kind for job in self.running.values()}
        for kind, name in _STAGES:
            if kind in kinds and "trial" not in kinds:
                return name
        return "trials"

    def has_work(self) -> bool:
        """Return whether any job is left to run; call this only while no job is running."""
        if self.stopping or self.failure:
            return False
        if any(self._state(*job) is None for job in [("float", 0), *self._before_trials()]):
            return True
        if self.trials.open or (self.remaining_trials() > 0 and not self.limit_reached()):
            return True
        return not self._tested and self._test_job() is not None

    def remaining_trials(self) -> int:
        """Return the number of trials that have not ended; see `Trials.remaining`."""
        return self.trials.remaining()

    def next_job(self) -> Job | Verdict:
        """Take the next job, which then counts as running, or return whether to wait or to end."""
        if self.stopping or self.failure:
            return Verdict.DONE
        if "float" in self.running:  # wait even if a record exists: the job may have failed
            return Verdict.WAIT
        if self._state("float", 0) is None:
            return self._start(self._job("float", 0))
        for kind, number in self._before_trials():
            job = self._job(kind, number)
            if self._state(kind, number) is None and job.name not in self.running:
                return self._start(job)
        if SCORES in self.running:
            return Verdict.WAIT
        if (trial := self.trials.next()) is not None:
            return self._start(trial)
        if self.running:
            return Verdict.WAIT
        test = self._test_job()
        if test is None or self._tested:
            return Verdict.DONE
        self._tested = True
        return self._start(test)

    def finished(self, job: Job, lost: str | None = None) -> None:
        """Process the end of a job, and enter the result of a trial into the ledger.

        An unusable float model or failed sensitivity scores set `failure`.

        Args:
            job: a job that is no longer running.
            lost: why the job ended without a record; None if the job has a record, or stays open
                because it paused or a stop was requested.
        """
        self.running.pop(job.name, None)
        record = committed_record(job.folder)
        if record is None and lost is not None:
            self._lost.add(job.folder)
            record = {"state": jobs.FAIL, "reason": lost}
        if job.kind == "trial":
            self.trials.ended(job, record)
        elif job.kind == "float":
            self._check_float(record)
        elif job.kind == SCORES:
            self._check_scores(record)
        self.on_finished(job)

    def front(self) -> set[int]:
        """Return the numbers of the trials on the Pareto front; trials of users are ignored."""
        complete = self.ledger.trials(TrialState.COMPLETE)
        points = {t.number: (t.values[0], t.values[1]) for t in complete if not is_foreign(t)}
        return non_dominated(points, self.resolved.mode)

    def _check_float(self, record: Mapping[str, Any] | None) -> None:
        """Set `failure` if the float model failed, or if its file is missing or damaged."""
        if record is None:
            return
        folder = job_folder(self.out, "float", 0)
        if record["state"] == jobs.FAIL:
            self.failure = (
                f"the float model failed: {record['reason']}; fix this, then remove {folder} "
                "to start over"
            )
            return
        file = jobs.model_file(folder)
        same = blobs.digest_of(file) == record["model_sha256"]
        if not same or not blobs.can_be_read(file):
            self.failure = (
                f"{file}: missing or damaged; remove {folder} and run the same command "
                "again to train a new float model"
            )

    def _check_scores(self, record: Mapping[str, Any] | None) -> None:
        """Set `failure` if the sensitivity scores failed."""
        if record is not None and record["state"] == jobs.FAIL:
            folder = job_folder(self.out, SCORES, 0)
            self.failure = (
                f"the sensitivity scores failed: {record['reason']}; fix this, then remove "
                f"{folder} to start over"
            )

    def _before_trials(self) -> list[tuple[str, int]]:
        """Return the kinds and numbers of the jobs between the float model and the trials."""
        scores = [(SCORES, 0)] if self.config.needs_scores else []
        return scores + [("baseline", bits) for bits in self.config.search.baselines]

    def _start(self, job: Job) -> Job:
        self.running[job.name] = job
        return job

    def _state(self, kind: str, number: int) -> str | None:
        """Return the state of a job's record, or None if the job is open."""
        folder = job_folder(self.out, kind, number)
        if (record := committed_record(folder)) is not None:
            return str(record["state"])
        return jobs.FAIL if folder in self._lost else None

    def _job(self, kind: str, number: int, **more: Any) -> Job:
        return Job(
            kind=kind,
            number=number,
            out=str(self.out),
            config=self.document,
            run=self.run,
            seed=seed_for(self.config.seed, number, _SALTS[kind]),
            **more,
        )

    def _test_job(self) -> Job | None:
        """Return a job that evaluates all reported models that lack test metrics, or None.

        The reported models are the float model, the COMPLETE baselines and those on the front.
        """
        subjects = [self._job("float", 0)]
        subjects += [
            self._job("baseline", bits)
            for bits in self.config.search.baselines
            if self._state("baseline", bits) == jobs.COMPLETE
        ]
        for number in sorted(self.front()):
            record = committed_record(job_folder(self.out, "trial", number))
            if record is not None:
                subjects.append(
                    self._job("trial", number, params=record["params"], budget=record["budget"])
                )
        missing = [job for job in subjects if read_sealed(job.folder / TEST_FILE) is None]
        if not missing:
            return None
        return self._job("test", 0, jobs=tuple(job.as_json() for job in missing))
