"""Monitoring of a running sweep: its progress, limits, hung trials and outputs."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from nipq_search import file_io
from nipq_search.search import jobs
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.coordinator.resolved import ResolvedSweep
from nipq_search.search.jobs import STOP_FILE, Job
from nipq_search.search.jobs.lease import stop_requested
from nipq_search.search.results import documents
from nipq_search.search.results.outputs import (
    PAUSE_FACTOR,
    RUN_STATUS_ATTRIBUTE,
    Outputs,
    RunStatus,
)
from nipq_search.search.results.progress import Progress, ProgressSink
from nipq_search.search.study.database_lease import LeaseLost
from nipq_search.search.worker import failures

_log = logging.getLogger("nipq_search")
_KILL_GRACE_SECONDS = 15
"""How long a worker may take to stop on its own once `limits.trial_minutes` is exceeded."""
_CHECK_INTERVAL_SECONDS = 5
"""Interval at which `tick` checks limits and hung trials, and records running ones."""


def format_cost(value: float) -> str:
    """Format a cost with thousands separators and no unit prefix; fractions have two decimals."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


class Monitor:
    """Watches a running sweep and keeps its outputs up to date.

    Args:
        out: the sweep's folder.
        config: the sweep configuration.
        resolved: the resolved sweep: its graph, budgets and costs.
        coordinator: schedules the jobs of the sweep.
        progress: receives progress updates and messages.
        stop: event that the signal handlers set to request a stop.
        guard: called by `begin`, `tick` and `finish` before they write; raises `LeaseLost` once
            this driver has lost its lease.

    Attributes:
        limit: the limit that has been reached, as `key (value)`; empty if there is none.
        interrupted: whether a signal or a stop request ended the run.
        problem: why the test split could not be evaluated or an output could not be written; empty
            if there was no such problem.
    """

    def __init__(
        self,
        *,
        out: Path,
        config: SweepConfig,
        resolved: ResolvedSweep,
        coordinator: Coordinator,
        progress: ProgressSink,
        stop: threading.Event,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """Store the arguments and start the clock for `limits.hours`."""
        self.out, self.config, self.resolved, self.coordinator = out, config, resolved, coordinator
        self.progress, self.stop, self.guard = progress, stop, guard
        self.outputs = Outputs(out, config)
        self.limit = ""
        self.interrupted = False
        self.problem = ""
        self._started = time.monotonic()
        self._checked = self._running_shown_until = 0.0
        self._total_samples = 0
        self._samples: dict[Path, int] = {}
        self._uncommitted: dict[Path, Job] = {}
        self._seen_since: dict[str, float] = {}
        self._finish_times: list[float] = []
        self._trials_began = 0.0

    def begin(self) -> None:
        """Open the tracking run, bring all outputs up to date and report missing records."""
        self.guard()
        # `finish` overwrites this status, so it remains only if the driver is killed.
        self.coordinator.ledger.remember(RUN_STATUS_ATTRIBUTE, RunStatus.KILLED.value)
        self._samples = documents.samples_by_job(self.out)
        self._total_samples = sum(self._samples.values())
        self.outputs.begin(self.coordinator.ledger.trials())
        self._warn_about_missing_records()

    def _warn_about_missing_records(self) -> None:
        """Report COMPLETE trials whose records are missing from the sweep's folder."""
        done = [r.trial for r in self.outputs.records if r.state == jobs.COMPLETE and r.cost]
        lost = [
            n for n in done if not jobs.committed_record(jobs.job_folder(self.out, "trial", n))
        ]
        if lost:
            names = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
            self.progress.message(
                f"records of finished trials ({names}; {len(lost)} in total) are missing from "
                f"{self.out / 'trials'}; restore them: a trial without a record has no model"
            )

    def limit_reached(self) -> bool:
        """Return whether a limit forbids new trials; if so, set `limit` to the limit reached."""
        limits = self.config.limits
        if limits.samples is not None and self._total_samples >= limits.samples:
            self.limit = f"limits.samples ({limits.samples})"
        if limits.hours is not None and time.monotonic() - self._started > 3600 * limits.hours:
            self.limit = f"limits.hours ({limits.hours:g})"
        return bool(self.limit)

    def tick(self) -> None:
        """Handle stop requests, limits and hung trials, and update the outputs and the progress.

        The executor calls this method repeatedly while jobs run.
        """
        self.guard()
        self._handle_stop_request()
        if not self._trials_began and self.coordinator.stage == "trials":
            self._trials_began = time.monotonic()
        if time.monotonic() - self._checked > _CHECK_INTERVAL_SECONDS:
            self._checked = time.monotonic()
            for job in [*self.coordinator.running.values(), *self._uncommitted.values()]:
                self._count_samples(job)
            hours = self.config.limits.hours
            if self.limit_reached() and hours is not None and "hours" in self.limit:
                self._stop_workers()
            self._kill_hung()
            self._record_running()
        self.outputs.write_tables()
        self.progress.update(self._progress())

    def _count_samples(self, job: Job) -> None:
        """Add the samples that a job has processed since they were last counted."""
        if job.kind != "test":
            # The last write of a process on another node may become visible with a delay, so keep
            # counting the samples of a job that has ended until its record appears.
            ended = job.name not in self.coordinator.running
            if ended and jobs.committed_record(job.folder) is None:
                self._uncommitted[job.folder] = job
            else:
                self._uncommitted.pop(job.folder, None)
            processed = jobs.samples_processed(job.folder)
            self._total_samples += processed - self._samples.get(job.folder, 0)
            self._samples[job.folder] = processed

    def _handle_stop_request(self) -> None:
        # When `limits.hours` is reached, the driver itself writes the stop request. This is not an
        # interruption.
        stopping = self.coordinator.stopping
        requested = self.stop.is_set() or (not stopping and stop_requested(self.out))
        if requested and not self.interrupted:
            self.interrupted = True
            self._stop_workers()

    def _stop_workers(self) -> None:
        self.coordinator.stop()
        if not stop_requested(self.out):
            file_io.write_bytes(self.out / STOP_FILE, b"stop\n")

    def _kill_hung(self) -> None:
        """Kill attempts that exceeded `limits.trial_minutes` and did not stop on their own."""
        minutes = self.config.limits.trial_minutes
        if minutes is None:
            return
        for job in list(self.coordinator.running.values()):
            if job.kind not in ("trial", "baseline"):
                continue
            attempt = jobs.live_start(job.folder, job.run)
            if attempt is None:
                continue
            # Use the driver's monotonic clock, which does not count the time during which the
            # machine is suspended.
            since = self._seen_since.setdefault(attempt["folder"], time.monotonic())
            if time.monotonic() - since < 60 * minutes + _KILL_GRACE_SECONDS:
                continue
            marker = Path(attempt["folder"]) / jobs.HANG
            file_io.write_bytes(marker, b"killed by the driver: did not end in time\n")
            if attempt["host"] == socket.gethostname():
                try:
                    os.kill(attempt["pid"], signal.SIGKILL)
                except ProcessLookupError:
                    _log.warning("%s: its process has already exited", job.name)
            elif attempt.get("node"):
                failures.kill_on(attempt["node"], attempt["pid"])

    def _refresh(self, running: bool = True) -> None:
        """Update the records from the ledger, then the tables; see `Outputs.refresh`."""
        self.outputs.refresh(self.coordinator.ledger.cached_trials(), running)

    def _record_running(self) -> None:
        """Update the outputs with the progress of running trials.

        To bound the share of time spent here, further calls do nothing until `PAUSE_FACTOR` times
        the duration of this call has passed.
        """
        numbers = {j.number for j in self.coordinator.running.values() if j.kind == "trial"}
        began = time.monotonic()
        if not numbers or began < self._running_shown_until:
            return
        self._refresh()
        for number in sorted(numbers):
            if self.outputs.records[number].state == "RUNNING":
                self.outputs.record(self.outputs.records[number])
        pause = PAUSE_FACTOR * (time.monotonic() - began)
        self._running_shown_until = time.monotonic() + pause

    def job_finished(self, job: Job) -> None:
        """Count a job's samples, report how it ended, and update the outputs of a finished trial.

        The job may have a result, be paused at a rung, or have stopped without a result. The
        ledger must already be up to date.
        """
        # `limit_reached` is called before the next trial starts, and depends on this count.
        self._count_samples(job)
        # Workers check for stop requests on their own and may stop before the next `tick`. Without
        # this call, the coordinator would restart their jobs.
        self._handle_stop_request()
        done = jobs.committed_record(job.folder)
        if job.kind == "test":  # test jobs share a folder; its last attempt belongs to this job
            last = jobs.attempts(job.folder)[-1:]
            done = file_io.read_sealed(last[0] / jobs.RESULT) if last else None
            if done and done["state"] == jobs.FAIL:
                self.problem = f"the test split: {done['reason']}"
            self.outputs.invalidate()  # the records of finished trials now include test metrics
        paused = job.kind == "trial" and len(jobs.rung_records(job.folder)) > job.rung
        state = str(done["state"]) if done else ("paused at a rung" if paused else "stopped")
        text = f"{job.name} {state}"
        if done and done.get("metrics"):
            metric, cost = self.resolved.metric, self.resolved.front_cost
            text += f": {metric} {done['metrics'].get(metric, float('nan')):.4f}"
            if cost in done.get("cost", {}):
                text += f", {cost} {format_cost(done['cost'][cost])}"
        elif done and done.get("reason"):
            text += f": {done['reason']}"
        self.progress.message(text)
        if done and job.kind == "trial":
            self._finish_times.append(time.monotonic())
            self._refresh(running=False)
            self.outputs.record(self.outputs.records[job.number])
            self.outputs.update_front()

    def _progress(self) -> Progress:
        ended = self.outputs.cache.states
        done = sum(ended.values())
        total = max(self.config.search.trials, len(self.outputs.records))
        left = None
        if self._finish_times and self._trials_began:
            # The estimate excludes the float model and the baselines, which train first.
            pace = (self._finish_times[-1] - self._trials_began) / len(self._finish_times)
            left = max(0, total - done) * pace
        return Progress(
            done=done,
            running=len(self.coordinator.running),
            failed=ended.get("FAIL", 0),
            total=total,
            stage=self.coordinator.stage,
            best=dict(self.outputs.cache.best),
            seconds_left=left,
            metric=self.resolved.metric,
            front_cost=self.resolved.front_cost,
        )

    def finish(self, status: RunStatus) -> None:
        """Write all outputs one last time and close the tracking run; never raises.

        An error sets `problem`. Without the lease, nothing is written.
        """
        try:
            self.guard()
            self.coordinator.ledger.remember(RUN_STATUS_ATTRIBUTE, status.value)
            self._refresh()
            self.outputs.finish(status)
        except LeaseLost:
            return  # another driver owns the sweep and its outputs now
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.problem = (
                "all trials are saved, but the tables or the report could not be written "
                f"({reason}); run the same command again to write them"
            )
