"""The objects that Ray Tune calls back. None holds state that a pickle could leak."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from nipq_search.search import jobs
from nipq_search.search.backend.base import STARTS
from nipq_search.search.coordinator.coordinator import Coordinator, Verdict
from nipq_search.search.jobs import Job, JobOutcome, OutcomeKind
from nipq_search.search.worker import failures

_RECORD_VISIBILITY_SECONDS = 90.0
"""Network file systems show what another node wrote with a delay, NFS after up to a minute."""


def _is_seen(job: Job) -> bool:
    """Whether the record that a worker has committed can be read here."""
    limit = time.monotonic() + _RECORD_VISIBILITY_SECONDS
    while jobs.committed(job.folder) is None:
        if job.kind == "test" or time.monotonic() > limit:
            return job.kind == "test" and bool(jobs.attempts(job.folder))
        time.sleep(1)
    return True


class JobSearcher(Searcher):
    """Hands the coordinator's jobs to Tune as suggestions and their ends back.

    Tune pickles its searcher into the experiment's folder; this one leaves everything behind,
    since nothing is ever restored from there and secrets must not be written.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        """Bind to a coordinator."""
        super().__init__(metric=None, mode=None)
        self._coordinator: Coordinator | None = coordinator
        self._jobs: dict[str, Job] = {}
        self._barren: dict[str, tuple[int, int]] = {}
        self.problem: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of ours."""
        return {
            "_metric": None,
            "_mode": None,
            "_coordinator": None,
            "_jobs": {},
            "_barren": {},
            "problem": None,
        }

    def set_search_properties(self, *args: Any, **kwargs: Any) -> bool:
        """Accept whatever Tune sets."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next job; None to wait; FINISHED at the end."""
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
        """A job ended; what that means stands in its record.

        A job whose process died before it could begin is open again, for a while. Tune swallows
        what is raised here: it waits in `problem`.
        """
        job = self._jobs.pop(trial_id, None)
        if job is None:
            return
        assert self._coordinator is not None
        outcome = JobOutcome.from_report(result)
        if error:
            self._count(job)
        try:
            if outcome is not None and outcome.kind is OutcomeKind.HALT:
                self._coordinator.halt(outcome.reason)
            elif outcome is not None and outcome.has_record and not _is_seen(job):
                self._coordinator.halt(
                    f"{job.name} has ended, but its record is not seen here: all nodes must share "
                    f"{job.out}; `nipq-search doctor --address ... --out ...` tells which do not"
                )
            barren = self._barren.get(job.name, (0, 0))[1]
            lost = failures.NEVER_STARTED if error and barren >= STARTS else None
            self._coordinator.finished(job, lost)
        except BaseException as raised:
            self.problem = self.problem or raised
            raise

    def _count(self, job: Job, cause: str | None = None) -> None:
        """Count the times in a row that a job's process died before it began an attempt."""
        begun, barren = self._barren.get(job.name, (0, 0))
        now = len(jobs.attempts(job.folder))
        if now > begun:
            self._barren[job.name] = (now, 0)
        elif cause != jobs.Cause.NODE:
            self._barren[job.name] = (now, barren + 1)

    def recovers(self, trial: Any) -> None:
        """A process ended without an answer and Tune starts it again.

        How often a job may fail is decided where it runs, by the causes of its attempts. Only
        processes that die before they begin an attempt are counted here.
        """
        job = self._jobs.get(trial.trial_id)
        if job is None:
            return
        error = failures.error_of(trial)
        with contextlib.suppress(OSError):  # a full disk; the worker will say so
            failures.record_causes(job.folder, job.run, error)
        self._count(job, failures.classify(error, node_is_dead=False))
        # The next end is the last, unless an attempt begins.
        barren = self._barren.get(job.name, (0, 0))[1]
        trial.max_failures = 0 if barren >= STARTS else -1

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class Ticker(Callback):
    """Calls a function about every second and soon after every report; tells of lost processes."""

    def __init__(self, tick: Callable[[], None] | None, searcher: JobSearcher | None) -> None:
        """Call `tick`, and the searcher with a Tune trial that is started again."""
        self._tick, self._searcher = tick, searcher
        self._last = 0.0
        self.busy = True

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of ours."""
        return {"_tick": None, "_searcher": None, "_last": 0.0, "busy": True}

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial failed and is to be started again."""
        if self._searcher is not None:
            self._searcher.recovers(trial)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Tune's loop went round once.

        Raises:
            BaseException: what the coordinator raised at the end of a job.
        """
        self.busy = any(trial.status == "RUNNING" for trial in trials)
        if self._searcher is not None and self._searcher.problem is not None:
            raise self._searcher.problem
        if self._tick is not None and time.monotonic() - self._last > 0.5:
            self._last = time.monotonic()
            self._tick()

    def get_state(self) -> dict[str, Any] | None:
        """Nothing of ours."""
        return None


class NothingRuns(Stopper):
    """Ends a sweep that is to stop once no job runs: others may wait for a node for ever."""

    def __init__(self, coordinator: Coordinator, ticker: Ticker) -> None:
        """Bind to a coordinator, and to what sees Tune's trials."""
        self._coordinator: Coordinator | None = coordinator
        self._ticker: Ticker | None = ticker

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of ours."""
        return {"_coordinator": None, "_ticker": None}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is ended so."""
        return False

    def stop_all(self) -> bool:
        """Whether all is to end."""
        if self._coordinator is None or self._ticker is None:
            return False
        ending = self._coordinator.stopping or bool(self._coordinator.failure)
        return ending and not self._ticker.busy
