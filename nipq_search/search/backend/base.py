"""How jobs get onto machines: the protocol that every executor follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.jobs import Job, JobOutcome
from nipq_search.tasks import Task

STARTS = 4
"""Times that a process may die before it begins an attempt."""

Work = Callable[[Job, Task, Callable[[dict[str, Any]], None]], JobOutcome]
"""What does a job: `nipq_search.search.worker.worker.execute`, or a stand-in for it."""


class Executor(Protocol):
    """Runs a coordinator's jobs until it has no more.

    Every job that is handed out is told to have ended exactly once. A process that dies is started
    again; how often a job may fail is decided by its own attempts. Work that finds its machine
    unfit ends everything. What `tick` raises ends the run.
    """

    def run(self, coordinator: Coordinator, task: Task, tick: Callable[[], None]) -> None:
        """Start every job that the coordinator hands out and tell it how each one ended.

        Args:
            coordinator: asked for the next job whenever there is room.
            task: the sweep's task, its data loaded; reaches each node once.
            tick: called about every second and after every report, in this thread.
        """
        ...
