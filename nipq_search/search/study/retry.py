"""Calls to the study's database that outlive a short outage of its server."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from optuna.exceptions import StorageInternalError

PATIENCE_SECONDS = 15.0
"""Shorter than a driver goes without its lease; see `storage_lease.SILENT_SECONDS`."""

_PAUSE_SECONDS = 0.5

Method = TypeVar("Method", bound=Callable[..., Any])


class Guarded(Protocol):
    """What has such methods."""

    guard: Callable[[], None]


def patient(method: Method) -> Method:
    """A method that may be repeated: again, as long as the server is away and the lease is held.

    Raises:
        StorageInternalError: the server is away for longer.
    """

    @functools.wraps(method)
    def call(self: Guarded, *args: Any, **kwargs: Any) -> Any:
        limit = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return method(self, *args, **kwargs)
            except StorageInternalError:
                if time.monotonic() > limit:
                    raise
                self.guard()
                time.sleep(_PAUSE_SECONDS)

    return call  # type: ignore[return-value]
