"""The protocol that all executors implement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.jobs import Job, JobOutcome
from nipq_search.tasks import Task

MAX_FAILED_STARTS = 4
"""How many times in a row the process of a job may die before beginning an attempt."""

Work = Callable[[Job, Task, Callable[[dict[str, Any]], None]], JobOutcome]
"""A function that executes a job: `nipq_search.search.worker.worker.execute` or a substitute."""


class Executor(Protocol):
    """Runs a coordinator's jobs until none are left.

    Every job is reported to the coordinator as finished exactly once. If the process of a job
    dies, the job is retried until it has reached a limit on its failures. A fault of the machine,
    such as a full disk, halts the sweep. An exception raised by `tick` ends the run.
    """

    def run(self, coordinator: Coordinator, task: Task, tick: Callable[[], None]) -> None:
        """Run the coordinator's jobs and report to it when each one ends.

        Args:
            coordinator: source of the jobs, queried whenever a slot is free.
            task: the sweep's task with its data loaded; sent to each node once.
            tick: called repeatedly in the calling thread while jobs run, at an interval that the
                executor determines.
        """
        ...
