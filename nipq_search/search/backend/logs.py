"""What Ray has to say about a run goes into a file, not between the lines of the progress."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from nipq_search.search.jobs.paths import LOG_FILE


@contextlib.contextmanager
def driver_log(out: Path) -> Iterator[None]:
    """Send the loggers of Ray to `driver.log` in the sweep's folder.

    Enter it after Ray has started, for Ray sets up its loggers then. Why a job ended stands in
    the job's own record; the log has the tracebacks of processes that died.
    """
    handler = logging.FileHandler(out / LOG_FILE, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("ray", "ray.tune", "ray.air")]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()
