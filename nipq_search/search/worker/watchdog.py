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
    """Append the output of Python code to a file instead of printing it, and log there, too."""
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
    """End this process if the attempt exceeds its time limit; first write all stacks to `path`.

    A thread outside the interpreter enforces the limit, even if the attempt's code never releases
    the interpreter lock. If `minutes` is None, there is no limit and no file.
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
