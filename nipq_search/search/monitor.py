"""What the driver does beside deciding: progress, limits, hung trials, projections."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from nipq_search import storage
from nipq_search.search import jobs
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.coordinator.resolved import Facts
from nipq_search.search.jobs import STOP_FILE, Job
from nipq_search.search.jobs.lease import stop_requested
from nipq_search.search.results import documents
from nipq_search.search.results.outputs import ENDED, PAUSE, Projections
from nipq_search.search.results.progress import Progress, ProgressSink
from nipq_search.search.study.database_lease import LeaseLost
from nipq_search.search.worker import failures

_log = logging.getLogger("nipq_search")
_GRACE_SECONDS = 15
_CHECK_SECONDS = 5


def figure(value: float) -> str:
    """A cost in full: whole numbers with separators, others with two digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


class Driver:
    """Watches a running sweep and keeps its projections up to date.

    Args:
        out: the sweep's folder.
        config: the sweep.
        facts: graph and budgets.
        progress: shows how far it is.
        stop: set by a signal.
        guard: raises once this driver must write nothing more.
    """

    def __init__(
        self,
        *,
        out: Path,
        config: SweepConfig,
        facts: Facts,
        progress: ProgressSink,
        stop: threading.Event,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the clock of the hours limit."""
        self.out, self.config, self.facts = out, config, facts
        self.progress, self.stop, self.guard = progress, stop, guard
        self.shown = Projections(out, config)
        self.started = time.monotonic()
        self.limit = ""
        self.interrupted = False
        self.problem = ""
        self.checked = self.looked_until = 0.0
        self.samples = 0
        self._samples: dict[Path, int] = {}
        self._unsure: dict[Path, Job] = {}
        self._seen_since: dict[str, float] = {}
        self.finished_here: list[float] = []
        self.trials_began = 0.0

    def begin(self, coordinator: Coordinator) -> None:
        """Open the tracking run and bring every projection up to date."""
        self.coordinator = coordinator
        self.guard()
        coordinator.ledger.remember(ENDED, "KILLED")  # unless it says otherwise at its end
        self._samples = documents.samples_by_job(self.out)
        self.samples = sum(self._samples.values())
        self.shown.begin(coordinator.ledger.trials())
        self._tell_what_is_gone()

    def _tell_what_is_gone(self) -> None:
        """Finished trials whose records somebody deleted: nothing is lost without a word."""
        done = [r.trial for r in self.shown.records if r.state == jobs.COMPLETE and r.cost]
        gone = [n for n in done if not jobs.committed(jobs.job_folder(self.out, "trial", n))]
        if gone:
            names = ", ".join(map(str, gone[:5])) + (", ..." if len(gone) > 5 else "")
            self.progress.message(
                f"records of finished trials ({names}; {len(gone)} in all) are gone from "
                f"{self.out / 'trials'}; restore them: without one, a trial has no model"
            )

    def enough(self) -> bool:
        """Whether a limit forbids new trials."""
        limits = self.config.limits
        if limits.samples is not None and self.samples >= limits.samples:
            self.limit = f"limits.samples ({limits.samples})"
        if limits.hours is not None and time.monotonic() - self.started > 3600 * limits.hours:
            self.limit = f"limits.hours ({limits.hours:g})"
        return bool(self.limit)

    def tick(self) -> None:
        """Once a second: stop requests, limits, hung trials, the progress line."""
        self.guard()
        # The hours limit stops workers by the same file; that is no interruption.
        stopping = self.coordinator.stopping
        if not self.trials_began and self.coordinator.stage == "trials":
            self.trials_began = time.monotonic()
        asked = self.stop.is_set() or (not stopping and stop_requested(self.out))
        if asked and not self.interrupted:
            self.interrupted = True
            self._ask_workers_to_stop()
        if time.monotonic() - self.checked > _CHECK_SECONDS:
            self.checked = time.monotonic()
            for job in [*self.coordinator.running.values(), *self._unsure.values()]:
                self._count(job)
            hours = self.config.limits.hours
            if self.enough() and hours is not None and "hours" in self.limit:
                self._ask_workers_to_stop()
            self._kill_hung()
            self._record_running()
        self.shown.write_tables()
        self.progress.update(self._progress())

    def _count(self, job: Job) -> None:
        """Add what a job has processed since it was counted last."""
        if job.kind != "test":
            # What a process of another node wrote last may be seen late.
            ended = job.name not in self.coordinator.running
            if ended and jobs.committed(job.folder) is None:
                self._unsure[job.folder] = job
            else:
                self._unsure.pop(job.folder, None)
            now = jobs.samples_processed(job.folder)
            self.samples += now - self._samples.get(job.folder, 0)
            self._samples[job.folder] = now

    def _ask_workers_to_stop(self) -> None:
        self.coordinator.stop()
        if not stop_requested(self.out):
            storage.write_bytes(self.out / STOP_FILE, b"stop\n")

    def _kill_hung(self) -> None:
        """End attempts that outlasted their minutes and did not end themselves (stopped, say)."""
        minutes = self.config.limits.trial_minutes
        if minutes is None:
            return
        for job in list(self.coordinator.running.values()):
            if job.kind not in ("trial", "baseline"):
                continue
            attempt = jobs.live_attempt(job.folder, job.run)
            if attempt is None:
                continue
            # By a clock of this machine that stands still while it sleeps.
            since = self._seen_since.setdefault(attempt["folder"], time.monotonic())
            if time.monotonic() - since < 60 * minutes + _GRACE_SECONDS:
                continue
            marker = Path(attempt["folder"]) / jobs.HANG
            storage.write_bytes(marker, b"killed by the driver: no sign of an end in time\n")
            if attempt["host"] == socket.gethostname():
                try:
                    os.kill(attempt["pid"], signal.SIGKILL)
                except ProcessLookupError:
                    _log.warning("%s: its process is gone", job.name)
            elif attempt.get("node"):
                failures.kill_on(attempt["node"], attempt["pid"])

    def _refresh(self, running: bool = True) -> None:
        """Read the ledger again and write the tables."""
        self.shown.refresh(self.coordinator.ledger.look(), running)

    def _record_running(self) -> None:
        """Show how far running trials are, in at most one part in `PAUSE` of the time."""
        numbers = {j.number for j in self.coordinator.running.values() if j.kind == "trial"}
        began = time.monotonic()
        if not numbers or began < self.looked_until:
            return
        self._refresh()
        for number in sorted(numbers):
            if self.shown.records[number].state == "RUNNING":
                self.shown.record(self.shown.records[number])
        self.looked_until = time.monotonic() + PAUSE * (time.monotonic() - began)

    def job_finished(self, job: Job) -> None:
        """A job's result is in the ledger: show it everywhere."""
        self._count(job)  # before a next trial is asked for
        done = jobs.committed(job.folder)
        if (
            job.kind == "test"
        ):  # several test jobs share the folder: the last attempt is this one's
            last = jobs.attempts(job.folder)[-1:]
            done = storage.read_sealed(last[0] / jobs.RESULT) if last else None
            if done and done["state"] == jobs.FAIL:
                self.problem = f"the test split: {done['reason']}"
            self.shown.forget()  # test figures have come
        paused = job.kind == "trial" and len(jobs.rung_records(job.folder)) > job.rung
        state = str(done["state"]) if done else ("paused at a rung" if paused else "stopped")
        text = f"{job.name} {state}"
        if done and done.get("metrics"):
            metric, cost = self.facts.metric, self.facts.front_cost
            text += f": {metric} {done['metrics'].get(metric, float('nan')):.4f}"
            if cost in done.get("cost", {}):
                text += f", {cost} {figure(done['cost'][cost])}"
        elif done and done.get("reason"):
            text += f": {done['reason']}"
        self.progress.message(text)
        if done and job.kind == "trial":
            self.finished_here.append(time.monotonic())
            self._refresh(running=False)
            self.shown.record(self.shown.records[job.number])
            self.shown.update_front()

    def _progress(self) -> Progress:
        known = self.shown.known
        done = sum(known.states.values())
        total = max(self.config.search.trials, len(self.shown.records))
        left = None
        if self.finished_here and self.trials_began:
            # The float model and the baselines came first: the pace is that of the trials.
            pace = (self.finished_here[-1] - self.trials_began) / len(self.finished_here)
            left = max(0, total - done) * pace
        return Progress(
            done=done,
            running=len(self.coordinator.running),
            failed=known.states.get("FAIL", 0),
            total=total,
            stage=self.coordinator.stage,
            best=dict(known.best),
            seconds_left=left,
            metric=self.facts.metric,
            front_cost=self.facts.front_cost,
        )

    def finish(self, status: str) -> None:
        """Write every projection once more and close the tracking run. Never raises."""
        try:
            self.guard()
            self.coordinator.ledger.remember(ENDED, status)
            self._refresh()
            self.shown.finish(status)
        except LeaseLost:
            return  # all of it is another driver's now
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.problem = (
                f"the trials are safe, but tables or report could not be written ({reason}); "
                "the same command writes them again"
            )
