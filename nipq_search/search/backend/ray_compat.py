"""Patches of Ray internals and calls to them, each with its reason and the tested version.

All functions here depend on names that are not part of Ray's documented interface. After an
upgrade of Ray, `tests/search/backend` and `tests/cluster` fail if one of these names has changed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError

GCS_RECONNECT_TIMEOUT = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Environment variable of an internal Ray setting: the number of seconds for which processes try
to reconnect to a lost head. Tested with Ray 2.60."""


def set_restart_allowed(trial: Any, allowed: bool) -> None:
    """Set whether Tune restarts a trial's process after its next failure.

    Tune applies one `max_failures` to all trials, but the number of failed starts is counted per
    job. Sets `ray.tune.experiment.Trial.max_failures`; tested with Ray 2.60.
    """
    trial.max_failures = -1 if allowed else 0


class OutOfMemoryError(RayActorError):
    """Actor error that stands in for the Ray error of the same name."""


@contextlib.contextmanager
def ray_errors_as_actor_deaths() -> Iterator[None]:
    """Treat every `RayError` of an actor, such as a lack of memory, as the death of that actor.

    Tune's actor manager handles only actor and task errors and aborts the whole run on any other
    `RayError`, such as `ray.exceptions.OutOfMemoryError`. Patches
    `RayActorManager._actor_task_failed`; tested with Ray 2.60.
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

    Ray binds to all interfaces unless a private switch disables multi-node clusters, which is the
    default only on Windows and macOS. A value set by the user takes precedence. Sets
    `ray_constants.ENABLE_RAY_CLUSTER` and its environment variable; tested with Ray 2.60.
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


def check_head(address: str) -> None:
    """Check that a Ray head responds at `HOST:PORT`, or at the address that `auto` stands for.

    If a program other than Ray listens at the address, `ray.init` waits indefinitely, whereas the
    GCS client raises an error after 40 seconds. Uses `ray._raylet.GcsClient` and
    `ray._private.services`; tested with Ray 2.60.

    Args:
        address: `HOST:PORT` of the head, or `auto`.

    Raises:
        Exception: no head responded; the GCS client determines the type of the error.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    GcsClient(address=canonicalize_bootstrap_address_or_die(address))


def reread_settings() -> None:
    """Make Ray reread its environment variables, which it normally reads once per process.

    Uses `Config` and `AuthenticationTokenLoader` of `ray._raylet`; earlier versions of Ray, which
    lack them, have no authentication. Tested with Ray 2.60.
    """
    with contextlib.suppress(ImportError):
        from ray._raylet import (  # type: ignore[attr-defined]
            AuthenticationTokenLoader,
            Config,
        )

        Config.initialize("")  # must come first: it sets the mode for the token lookup
        AuthenticationTokenLoader.instance().reset_cache()
