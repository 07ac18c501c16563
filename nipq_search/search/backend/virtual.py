"""An executor without processes: jobs take turns in virtual time.

For simulations of large sweeps, and for sweeps in one process. It keeps to what `TuneExecutor`
does: tests/search/backend/test_executors.py holds both to it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from nipq_search.search import jobs
from nipq_search.search.backend.base import STARTS, Work
from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.jobs import Job, OutcomeKind
from nipq_search.search.worker import failures
from nipq_search.search.worker.worker import execute
from nipq_search.tasks import Task


class Died(Exception):
    """Raised by work in place of the end of its process."""


class VirtualExecutor:
    """Runs jobs in this process, each at the moment when it ends in virtual time.

    Args:
        slots: jobs at once.
        work: does a job; by default what a worker does.
        seconds: virtual duration of an attempt of a job.

    Attributes:
        now: virtual time, seconds since the start.
        busy: virtual seconds of all attempts together.
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
        """See `nipq_search.search.backend.base.Executor`."""
        while True:
            while len(self._queue) < self.slots:
                job = coordinator.next_job()
                if not isinstance(job, Job):
                    break
                self._start(job, 0)
            if not self._queue:
                return
            self.now, _, job, barren = heapq.heappop(self._queue)
            before = len(jobs.attempts(job.folder))
            try:
                outcome = self.work(job, task, lambda report: None)
            except Died as error:
                failures.record_causes(job.folder, job.run, error)
                barren = 0 if len(jobs.attempts(job.folder)) > before else barren + 1
                if barren <= STARTS:
                    self._start(job, barren)
                    tick()
                    continue
                coordinator.finished(job, failures.NEVER_STARTED)
            else:
                if outcome.kind is OutcomeKind.HALT:
                    coordinator.halt(outcome.reason)
                coordinator.finished(job)
            tick()

    def _start(self, job: Job, barren: int) -> None:
        seconds = self.seconds(job)
        self.busy += seconds
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), job, barren))
