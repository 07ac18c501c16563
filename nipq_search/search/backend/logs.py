"""Redirection of Ray's log messages to a file, to keep them out of the progress output."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from nipq_search.search.jobs.paths import LOG_FILE


@contextlib.contextmanager
def driver_log(out: Path) -> Iterator[None]:
    """Redirect Ray's loggers to `driver.log` in the sweep's folder.

    Enter this context after Ray has started, because Ray configures its loggers when it starts.
    The log contains the tracebacks of processes that died. The reason why a job failed is stored
    in its record.
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
