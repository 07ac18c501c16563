"""The two objects that Ray Tune calls back. Neither holds state that a pickle could leak."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback
from ray.tune.search import Searcher

from nipq_search.search import faults, jobs
from nipq_search.search.coordinator import Coordinator, Verdict
from nipq_search.search.executor import STARTS
from nipq_search.search.jobs import Job
from nipq_search.search.worker import HALT


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
        self._starts: dict[str, tuple[int, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of ours."""
        return {"_metric": None, "_mode": None, "_coordinator": None, "_jobs": {}, "_starts": {}}

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
        """A job ended; what that means stands in its record."""
        job = self._jobs.pop(trial_id, None)
        if job is None:
            return
        assert self._coordinator is not None
        state = str((result or {}).get("state", ""))
        if state.startswith(HALT):
            self._coordinator.halt(state.removeprefix(HALT))
        lost = faults.NEVER_STARTED if error else None
        self._coordinator.finished(job, lost)

    def recovers(self, trial: Any) -> None:
        """A process ended without an answer and Tune starts it again.

        How often a job may fail is decided where it runs, by the causes of its attempts. Only
        processes that die before they begin an attempt are counted here.
        """
        job = self._jobs.get(trial.trial_id)
        if job is None:
            return
        with contextlib.suppress(OSError):  # a full disk; the worker will say so
            faults.judge(job.folder, job.run, faults.error_of(trial))
        begun, barren = self._starts.get(trial.trial_id, (0, 0))
        now = len(jobs.attempts(job.folder))
        self._starts[trial.trial_id] = (now, 0 if now > begun else barren + 1)
        if self._starts[trial.trial_id][1] >= STARTS:
            trial.max_failures = 0  # the next end is the last

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class Ticker(Callback):
    """Calls a function about every second and soon after every report; tells of lost processes."""

    def __init__(
        self, tick: Callable[[], None] | None, recovers: Callable[[Any], None] | None = None
    ) -> None:
        """Call `tick`, and `recovers` with a Tune trial that is started again."""
        self._tick, self._recovers = tick, recovers
        self._last = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of ours."""
        return {"_tick": None, "_recovers": None, "_last": 0.0}

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial failed and is to be started again."""
        if self._recovers is not None:
            self._recovers(trial)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Tune's loop went round once."""
        if self._tick is not None and time.monotonic() - self._last > 0.5:
            self._last = time.monotonic()
            self._tick()

    def get_state(self) -> dict[str, Any] | None:
        """Nothing of ours."""
        return None
