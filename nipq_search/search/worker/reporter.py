"""The files that show an attempt's progress, and the checks whether the attempt must stop."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nipq_search import file_io
from nipq_search.records import CurvePoint
from nipq_search.search import jobs
from nipq_search.search.jobs import Job
from nipq_search.search.jobs.lease import stop_requested
from nipq_search.train import Interrupted

_POLL_SECONDS = 0.5
_WRITE_SECONDS = 2.0


class Reporter:
    """Writes an attempt's learning curve and progress file, and checks whether it must stop.

    All methods except `write` are hooks of the training run; see `Hooks`.

    Args:
        job: the job.
        attempt: the attempt's folder.
        report: called after every epoch with a dictionary of `epoch` and `job`, the job's name.
    """

    def __init__(self, job: Job, attempt: Path, report: Callable[[dict[str, Any]], None]) -> None:
        """Store the arguments; nothing is written."""
        self.job, self.attempt, self.report = job, attempt, report
        self._samples = 0
        self._epoch = 0
        self._polled = 0.0
        self._written = 0.0
        self._stopping = False

    def on_epoch(self, point: CurvePoint) -> None:
        """Append a point to the learning curve, write the progress file, and report the epoch."""
        self._epoch = point.epoch
        with (self.attempt / jobs.CURVE).open("a") as file:
            file.write(json.dumps(dataclasses.asdict(point)) + "\n")
        self.write()
        self.report({"epoch": point.epoch, "job": self.job.name})

    def on_samples(self, count: int) -> None:
        """Add `count` processed samples; write the progress file at most every two seconds."""
        self._samples += count
        if time.monotonic() - self._written > _WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the progress file immediately."""
        self._written = time.monotonic()
        file_io.write_json(
            self.attempt / jobs.PROGRESS,
            {"samples": self._samples, "epoch": self._epoch, "time": time.time()},
        )

    def before_write(self) -> None:
        """Prevent this attempt from overwriting the files of a later one.

        Raises:
            Interrupted: a later attempt has taken over the job.
        """
        if jobs.is_superseded(self.attempt):
            raise Interrupted

    def should_stop(self) -> bool:
        """Return whether a stop was requested or a later attempt has taken over the job.

        The files are checked at most twice a second. Once the result is True, it remains so.
        """
        if not self._stopping and time.monotonic() - self._polled > _POLL_SECONDS:
            self._polled = time.monotonic()
            superseded = jobs.is_superseded(self.attempt)
            self._stopping = stop_requested(Path(self.job.out)) or superseded
        return self._stopping
