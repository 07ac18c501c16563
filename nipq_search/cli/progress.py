"""Progress display of a running sweep: a live line on terminals, log lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from nipq_search.cli import numbers
from nipq_search.cli.output import console

if TYPE_CHECKING:
    from nipq_search.search.results.progress import Progress

SECONDS_BETWEEN_LINES = 10.0
"""Minimum time between two progress lines in a file or pipe."""


def progress_line(progress: Progress) -> str:
    """Format `progress` as one line, with the most important parts first in case it is cut off."""
    done = f"{progress.done}/{progress.total} trials"
    if progress.stage != "trials":
        done = f"{progress.stage}, {done}"
    parts = [done, f"{progress.running} running", f"{progress.failed} failed"]
    if progress.seconds_left is not None:
        parts.append(f"{numbers.duration(progress.seconds_left)} left")
    if progress.best:
        best = "; ".join(
            f"{label.removeprefix(f'{progress.front_cost}: ')} {numbers.metric(value)}"
            for label, (value, _) in progress.best.items()
        )
        parts.append(f"best {progress.metric}: {best}")
    return numbers.one_line(", ".join(parts))


class ProgressLine:
    """A `ProgressSink` that keeps one line at the bottom of a terminal up to date."""

    def __init__(self, stream: TextIO) -> None:
        """Prepare the display for `stream`, which must be a terminal."""
        from rich.live import Live

        self._console = console(stream)
        # Redraw only on update. This requires no thread, and users can recognize a hung driver
        # because the line stops changing.
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> ProgressLine:
        """Start drawing the live line."""
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the live line; messages remain."""
        self._live.stop()

    def update(self, progress: Progress) -> None:
        """Redraw the live line."""
        from rich.text import Text

        line = Text(progress_line(progress), no_wrap=True, overflow="crop")
        self._live.update(line, refresh=True)

    def message(self, text: str) -> None:
        """Print `text` on a permanent line above the live one."""
        self._console.print(numbers.one_line(text))


class ProgressLog:
    """A `ProgressSink` for files and pipes: writes every message, and progress at intervals."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """Store the stream to write to, and the clock, which returns seconds."""
        self._stream = stream
        self._clock = clock
        self._last_line = ""
        self._last_time = float("-inf")

    def __enter__(self) -> ProgressLog:
        """Return this object."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Do nothing."""

    def update(self, progress: Progress) -> None:
        """Write the progress if it has changed and the last line is at least 10 seconds old."""
        line = progress_line(progress)
        now = self._clock()
        if line == self._last_line or now - self._last_time < SECONDS_BETWEEN_LINES:
            return
        self._last_line, self._last_time = line, now
        self._write(line)

    def message(self, text: str) -> None:
        """Write `text` immediately."""
        self._write(numbers.one_line(text))

    def _write(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=self._stream, flush=True)


def progress_sink(stream: TextIO | None = None) -> ProgressLine | ProgressLog:
    """Return a progress display for `stream`, by default stderr; enter it as a context manager."""
    stream = stream or sys.stderr
    screen = console(stream)
    live = screen.is_terminal and not screen.is_dumb_terminal
    return ProgressLine(stream) if live else ProgressLog(stream)
