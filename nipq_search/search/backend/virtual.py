"""An executor that runs jobs in this process, one by one; their concurrency is simulated.

It is used to simulate large sweeps, and to run sweeps without Ray. It behaves like `TuneExecutor`;
`tests/search/backend/test_executors.py` runs the same tests on both.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from nipq_search.search import jobs
from nipq_search.search.backend.base import MAX_FAILED_STARTS, Work
from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.jobs import Job, OutcomeKind
from nipq_search.search.worker import failures
from nipq_search.search.worker.worker import execute
from nipq_search.tasks import Task


class Died(Exception):
    """Raised by a job to simulate the death of its process."""


class VirtualExecutor:
    """Runs jobs in the current process, in the order in which they end in virtual time.

    Args:
        slots: number of concurrent jobs.
        work: executes a job, or raises `Died`; by default, `worker.execute`.
        seconds: returns the virtual duration of an attempt in seconds.

    Attributes:
        now: virtual time in seconds since the start.
        busy: total virtual duration of all attempts in seconds.
    """

    def __init__(
        self,
        slots: int = 1,
        work: Work = execute,
        seconds: Callable[[Job], float] = lambda job: 1.0,
    ) -> None:
        """Start the virtual clock."""
        self.slots, self.work, self.seconds = slots, work, seconds
        self.now = self.busy = 0.0
        self._order = itertools.count()
        self._queue: list[tuple[float, int, Job, int]] = []

    def run(self, coordinator: Coordinator, task: Task, tick: Callable[[], None]) -> None:
        """Run the coordinator's jobs; see `Executor`.

        Args:
            coordinator: source of the jobs.
            task: the sweep's task with its data loaded.
            tick: called after every attempt and every failed start.
        """
        while True:
            while len(self._queue) < self.slots:
                job = coordinator.next_job()
                if not isinstance(job, Job):
                    break
                self._start(job, 0)
            if not self._queue:
                return
            self.now, _, job, failed_starts = heapq.heappop(self._queue)
            before = len(jobs.attempts(job.folder))
            try:
                outcome = self.work(job, task, lambda report: None)
            except Died as error:
                failures.record_causes(job.folder, job.run, error)
                failed_starts = 0 if len(jobs.attempts(job.folder)) > before else failed_starts + 1
                if failed_starts <= MAX_FAILED_STARTS:
                    self._start(job, failed_starts)
                    tick()
                    continue
                coordinator.finished(job, failures.NEVER_STARTED)
            else:
                if outcome.kind is OutcomeKind.HALT:
                    coordinator.halt(outcome.reason)
                coordinator.finished(job)
            tick()

    def _start(self, job: Job, failed_starts: int) -> None:
        """Enter a job into the queue; it runs once the clock has reached the attempt's end."""
        seconds = self.seconds(job)
        self.busy += seconds
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), job, failed_starts))
