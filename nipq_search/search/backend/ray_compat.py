"""Patches of Ray's internals, each with the versions that it was tested on and the reason.

Everything here reaches into private modules of Ray. When Ray is upgraded, `tests/search/backend`
fails where a name has gone. Tested with Ray 2.60.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError


class OutOfMemoryError(RayActorError):
    """An actor that Ray's memory monitor ended; the name is that of Ray's own error."""


@contextlib.contextmanager
def memory_faults() -> Iterator[None]:
    """Treat an actor that Ray's memory monitor killed like any other actor that died.

    Tune's actor manager handles errors of actors and of tasks only, and aborts the whole run on
    any other, such as `ray.exceptions.OutOfMemoryError`.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager

    managers: Any = RayActorManager
    original = managers._actor_task_failed

    def failed(manager: Any, tracked_actor_task: Any, exception: Exception) -> Any:
        if isinstance(exception, RayError) and not isinstance(
            exception, (RayActorError, RayTaskError)
        ):
            kind = OutOfMemoryError if "OutOfMemory" in type(exception).__name__ else RayActorError
            exception = kind(error_msg=" ".join(str(exception).split())[:500])
        return original(manager, tracked_actor_task, exception)

    managers._actor_task_failed = failed
    try:
        yield
    finally:
        managers._actor_task_failed = original


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Bind every process of a cluster started here to the loopback interface.

    Ray binds to all interfaces unless its private switch for clusters of one machine is set, which
    it sets by itself on Windows and macOS alone. A value that the user has set is kept.
    """
    from ray._private import ray_constants

    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    if name in os.environ:
        yield
        return
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name, None)


def connect_to_gcs(address: str) -> None:
    """Check that a Ray head answers at `HOST:PORT`.

    `ray.init` waits forever where something other than Ray listens; the GCS client gives up after
    40 seconds.

    Args:
        address: `HOST:PORT` of the head.

    Raises:
        Exception: whatever the client raises where no head answers.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    GcsClient(address=address)
