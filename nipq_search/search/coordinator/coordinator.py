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

from optuna.trial import TrialState

from nipq_search import blobs
from nipq_search.search import jobs
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.coordinator.resolved import Facts
from nipq_search.search.coordinator.trials import Trials
from nipq_search.search.jobs import SCORES, TEST_FILE, Job, committed, job_folder
from nipq_search.search.strategies.pareto import non_dominated
from nipq_search.search.study.ledger import Ledger
from nipq_search.storage import read_sealed
from nipq_search.train.loop import seed_for


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
        """Bind to a study; nothing is read or written before `reconcile`."""
        self.config, self.facts, self.ledger = config, facts, ledger
        self.out, self.run, self.enough, self.on_finished = out, run, enough, on_finished
        self.document = config.as_json()
        if (file := self.document["float"]["checkpoint"]) is not None:
            # Ray's workers have a working directory of their own.
            self.document["float"]["checkpoint"] = str(Path(file).expanduser().absolute())
        self.running: dict[str, Job] = {}
        self.stopping = False
        self.failure: str | None = None
        self.tested = False
        self._lost: set[Path] = set()
        self.trials = Trials(
            config=config,
            facts=facts,
            ledger=ledger,
            out=out,
            make_job=self._job,
            enough=enough,
        )

    def reconcile(self) -> None:
        """Bring the ledger up to date with what workers committed before this driver started.

        Call it once, before the first job.
        """
        self.trials.reconcile()
        self._check_float(committed(job_folder(self.out, "float", 0)))
        self._check_scores(committed(job_folder(self.out, SCORES, 0)))

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
        if self.trials.open or (self.open_trials() > 0 and not self.enough()):
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
        if (job_or_none := self.trials.next()) is not None:
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
        if job.kind == "trial":
            self.trials.ended(job, record)
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
            folder = job_folder(self.out, "float", 0)
            file = jobs.model_file(folder)
            same = blobs.digest_of(file) == record["model_sha256"]
            if not same or not blobs.can_be_read(file):
                self.failure = (
                    f"{file}: missing or damaged; remove {folder} and the same command "
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
        return self.trials.left()

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
