"""What is around an attempt: its output goes to a file, and it ends in time."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_log = logging.getLogger("nipq_search")


@contextlib.contextmanager
def captured(path: Path) -> Iterator[None]:
    """Send what the attempt prints and logs to its own file."""
    with path.open("a", buffering=1) as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        _log.addHandler(handler)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            _log.removeHandler(handler)


@contextlib.contextmanager
def watchdog(path: Path, minutes: float | None) -> Iterator[None]:
    """End this process, with a stack trace in `path`, if the attempt outlasts its minutes.

    A thread in C does it, so it works in an endless loop that never gives up the interpreter.
    """
    if minutes is None:
        yield
        return
    file: IO[bytes] = path.open("wb")
    faulthandler.dump_traceback_later(60 * minutes, exit=True, file=file.fileno())
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        file.close()
