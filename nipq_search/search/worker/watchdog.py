"""Context managers around an attempt: one captures its output, one enforces its time limit."""

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
    """Redirect everything that the attempt prints or logs to a file, appending to it."""
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
    """End this process and write a stack trace to `path` if the attempt exceeds its time limit.

    A C thread enforces the limit, so it also ends an attempt whose loop never releases the
    interpreter lock. Without a limit, do nothing.
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
