"""Objects whose methods Ray Tune calls; they are pickled without their state."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from nipq_search.search import jobs
from nipq_search.search.backend.base import MAX_FAILED_STARTS
from nipq_search.search.backend.ray_compat import set_restart_allowed
from nipq_search.search.coordinator.coordinator import Coordinator, Verdict
from nipq_search.search.jobs import Job, JobOutcome, OutcomeKind
from nipq_search.search.worker import failures

_RECORD_VISIBILITY_SECONDS = 90.0
"""Time limit for another node's write to become visible; NFS may delay it by a minute."""


def _becomes_visible(job: Job) -> bool:
    """Wait for a record that a worker has committed; return whether it can be read here.

    For a test job, do not wait: it suffices that one of its attempts is visible.
    """
    limit = time.monotonic() + _RECORD_VISIBILITY_SECONDS
    while jobs.committed_record(job.folder) is None:
        if job.kind == "test" or time.monotonic() > limit:
            return job.kind == "test" and bool(jobs.attempts(job.folder))
        time.sleep(1)
    return True


class JobSearcher(Searcher):
    """Passes the coordinator's jobs to Tune as suggestions, and their results back.

    Tune pickles its searcher into the experiment's folder. This searcher is pickled without its
    state, because it is never restored and the state may contain secrets.

    Attributes:
        problem: the first error that the coordinator raised when a job ended, or None.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        """Start without jobs."""
        super().__init__(metric=None, mode=None)
        self._coordinator: Coordinator | None = coordinator
        self._jobs: dict[str, Job] = {}
        self._failed_starts: dict[str, tuple[int, int]] = {}
        self.problem: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state for pickling."""
        # `_metric` and `_mode` are private attributes of Ray's Searcher (Ray 2.60).
        return {
            "_metric": None,
            "_mode": None,
            "_coordinator": None,
            "_jobs": {},
            "_failed_starts": {},
            "problem": None,
        }

    def set_search_properties(self, *args: Any, **kwargs: Any) -> bool:
        """Accept all properties that Tune sets, and ignore them."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Return the next job, None to wait, or FINISHED if there are no more jobs."""
        assert self._coordinator is not None
        job = self._coordinator.next_job()
        if job is Verdict.WAIT:
            return None
        if not isinstance(job, Job):
            return Searcher.FINISHED
        self._jobs[trial_id] = job
        return {"job": job.as_json()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Report the end of a job to the coordinator, which reads its record.

        If the machine is at fault or the record is not visible here, also halt the sweep. Tune
        swallows exceptions raised here, so the first one is stored in `problem`.

        Args:
            trial_id: Tune's ID of the job.
            result: the last report of the job.
            error: whether the process of the job died and Tune does not restart it.

        Raises:
            BaseException: an error raised by the coordinator.
        """
        job = self._jobs.pop(trial_id, None)
        if job is None:
            return
        assert self._coordinator is not None
        outcome = JobOutcome.from_report(result)
        if error:
            self._count_start(job)
        try:
            if outcome is not None and outcome.kind is OutcomeKind.HALT:
                self._coordinator.halt(outcome.reason)
            elif outcome is not None and outcome.has_record and not _becomes_visible(job):
                self._coordinator.halt(
                    f"{job.name} has ended, but its record is not visible here: all nodes must "
                    f"share {job.out}; `nipq-search doctor --address ... --out ...` lists the "
                    "nodes that do not"
                )
            failed_starts = self._failed_starts.get(job.name, (0, 0))[1]
            out_of_starts = error and failed_starts >= MAX_FAILED_STARTS
            lost = failures.NEVER_STARTED if out_of_starts else None
            self._coordinator.finished(job, lost)
        except BaseException as raised:
            self.problem = self.problem or raised
            raise

    def _count_start(self, job: Job, cause: str | None = None) -> None:
        """Count a failed start, unless an attempt has begun or the cause is the death of a node.

        If an attempt has begun since the last call, the count is reset, so that it is the number
        of consecutive failed starts.
        """
        known_attempts, failed_starts = self._failed_starts.get(job.name, (0, 0))
        attempts = len(jobs.attempts(job.folder))
        if attempts > known_attempts:
            self._failed_starts[job.name] = (attempts, 0)
        elif cause != jobs.Cause.NODE:
            self._failed_starts[job.name] = (attempts, failed_starts + 1)

    def on_process_restart(self, trial: Any) -> None:
        """Record why a process died, and decide whether Tune may restart it once more.

        `Ticker` calls this before Tune restarts the process. The worker limits a job's attempts,
        depending on why they failed. Only processes that die before an attempt begins are counted
        here.
        """
        job = self._jobs.get(trial.trial_id)
        if job is None:
            return
        error = failures.tune_trial_error(trial)
        with contextlib.suppress(OSError):  # a full disk is reported by the worker
            failures.record_causes(job.folder, job.run, error)
        self._count_start(job, failures.classify(error, node_is_dead=False))
        # After the last allowed start, another death is final unless an attempt has begun.
        failed_starts = self._failed_starts.get(job.name, (0, 0))[1]
        set_restart_allowed(trial, failed_starts < MAX_FAILED_STARTS)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger stores the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger stores the state."""


class Ticker(Callback):
    """Calls `tick` periodically, and notifies the searcher before a process is restarted.

    `tick` is called at most every 0.5 s, after an iteration of Tune's event loop.

    Args:
        tick: the function to call.
        searcher: notified before a process is restarted.

    Attributes:
        busy: whether any trial is running.
    """

    def __init__(self, tick: Callable[[], None] | None, searcher: JobSearcher | None) -> None:
        """Store the arguments."""
        self._tick, self._searcher = tick, searcher
        self._last = 0.0
        self.busy = True

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state for pickling."""
        return {"_tick": None, "_searcher": None, "_last": 0.0, "busy": True}

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Notify the searcher that Tune is about to restart a failed trial.

        Args:
            iteration: iteration of Tune's event loop.
            trials: all trials.
            trial: the failed trial.
            info: unused.
        """
        if self._searcher is not None:
            self._searcher.on_process_restart(trial)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Update `busy`, and call `tick` if it is due.

        Tune calls this after each iteration of its event loop.

        Args:
            iteration: iteration of Tune's event loop.
            trials: all trials.
            info: unused.

        Raises:
            BaseException: an error raised by `tick`, or by the coordinator when a job ended.
        """
        self.busy = any(trial.status == "RUNNING" for trial in trials)
        if self._searcher is not None and self._searcher.problem is not None:
            raise self._searcher.problem
        if self._tick is not None and time.monotonic() - self._last > 0.5:
            self._last = time.monotonic()
            self._tick()

    def get_state(self) -> dict[str, Any] | None:
        """Return None, because there is no state to restore."""
        return None


class StopWhenIdle(Stopper):
    """Ends Tune's event loop once the sweep is stopping or has failed and no job is running.

    Pending trials are not waited for, because they might never get a node.

    Args:
        coordinator: reports whether the sweep is stopping or has failed.
        ticker: reports whether a job is running.
    """

    def __init__(self, coordinator: Coordinator, ticker: Ticker) -> None:
        """Store the arguments."""
        self._coordinator: Coordinator | None = coordinator
        self._ticker: Ticker | None = ticker

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state for pickling."""
        return {"_coordinator": None, "_ticker": None}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: individual trials are never stopped."""
        return False

    def stop_all(self) -> bool:
        """Return whether to end Tune's event loop."""
        if self._coordinator is None or self._ticker is None:
            return False
        ending = self._coordinator.stopping or bool(self._coordinator.failure)
        return ending and not self._ticker.busy
