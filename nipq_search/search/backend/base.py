"""The protocol that all executors implement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.jobs import Job, JobOutcome
from nipq_search.tasks import Task

MAX_FAILED_STARTS = 4
"""Consecutive times that a job's process may die before it begins an attempt."""

Work = Callable[[Job, Task, Callable[[dict[str, Any]], None]], JobOutcome]
"""Function that executes a job: `nipq_search.search.worker.worker.execute`, or a substitute."""


class Executor(Protocol):
    """Runs a coordinator's jobs until none is left.

    Every job is reported to the coordinator as finished exactly once. A process that dies is
    restarted; the job's attempts limit the number of retries. A job that finds its machine unfit
    halts the sweep. An exception from `tick` ends the run.
    """

    def run(self, coordinator: Coordinator, task: Task, tick: Callable[[], None]) -> None:
        """Run the coordinator's jobs and report the end of each one.

        Args:
            coordinator: source of the jobs, queried whenever a slot is free.
            task: the sweep's task with its data loaded; sent to each node once.
            tick: called in this thread about every second and after every report.
        """
        ...
