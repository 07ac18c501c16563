"""Retries of study operations during a short outage of the database server.

`worker/worker.py` decides when a failed trial is not retried any more.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from optuna.exceptions import StorageInternalError

OUTAGE_SECONDS = 15.0
"""Longest outage that is waited out. It is shorter than `database_lease.SILENT_SECONDS`, after
which the driver would lose its lease."""

_PAUSE_SECONDS = 0.5

Method = TypeVar("Method", bound=Callable[..., Any])


class Guarded(Protocol):
    """An object whose methods may be retried."""

    guard: Callable[[], None]
    """Raises once the lease is lost."""


def retry_outages(method: Method) -> Method:
    """Retry an idempotent method while the server is unreachable and the lease is held.

    The decorated method raises `StorageInternalError` if the outage exceeds `OUTAGE_SECONDS`, and
    the error of `guard` if the lease is lost.
    """

    @functools.wraps(method)
    def call(self: Guarded, *args: Any, **kwargs: Any) -> Any:
        limit = time.monotonic() + OUTAGE_SECONDS
        while True:
            try:
                return method(self, *args, **kwargs)
            except StorageInternalError:
                if time.monotonic() > limit:
                    raise
                self.guard()
                time.sleep(_PAUSE_SECONDS)

    return call  # type: ignore[return-value]
