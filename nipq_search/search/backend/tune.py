"""The executor based on Ray Tune, and the Ray cluster that it runs on.

Tune only starts and restarts processes. The coordinator selects the jobs, interprets their results
and handles resumption, so Tune's own experiment state is temporary.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nipq_search.errors import UserError
from nipq_search.search.backend.base import Work
from nipq_search.search.backend.code_shipping import EXCLUDES, can_ship_code
from nipq_search.search.backend.nodes import check_trial_fits, slots
from nipq_search.search.backend.reaper import reap_ray_processes
from nipq_search.search.config.resources import ResourcesSection
from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.jobs import Job
from nipq_search.tasks import Task

AUTH_MODE = "RAY_AUTH_MODE"
"""Environment variable that sets whether connections to a cluster carry a token."""


def set_ray_defaults() -> None:
    """Set defaults for Ray's environment variables, mainly to disable telemetry and output.

    Also disables Tune's handling of Ctrl-C and its buffering of results. Variables that are
    already set keep their values.
    """
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",
        "TUNE_RESULT_BUFFER_LENGTH": "0",
    }.items():
        os.environ.setdefault(name, value)


def token_exists() -> bool:
    """Return whether an authentication token is set where Ray looks for one."""
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return given or (Path.home() / ".ray" / "auth_token").is_file()


def _is_open(address: str) -> bool:
    """Return whether a cluster responds without a token; leave the mode at `disabled`.

    A cluster requires a token only if `ray start` started it on a machine that has a token.
    `ray.init` sends no token by default, and a cluster without authentication cannot reply to a
    client that sends one.
    """
    from nipq_search.search.backend.ray_compat import check_head, reread_settings

    os.environ[AUTH_MODE] = "disabled"
    reread_settings()
    try:
        check_head(address)
    except Exception:  # the type depends on the reason, and none of the types is documented
        return False
    return True


def check_machine(resources: ResourcesSection) -> None:
    """Check that this machine has the cores and GPUs that one trial requests, without using Ray.

    Raises:
        UserError: the machine has too few cores or GPUs.
    """
    import torch

    wanted = resources.ray_resources()
    for name, most in {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}.items():
        if wanted.get(name, 0) > most:
            raise UserError(
                f"resources.{resources.key_of(name)}: one trial requests {wanted[name]:g}, but "
                f"this machine has {most}"
            )


def check_listening(address: str) -> None:
    """Check that a process listens at the address; without one, Ray would wait indefinitely.

    An address without a port, such as `auto`, is not checked.

    Raises:
        UserError: no process accepts connections there.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # Ray resolves `auto` itself
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from error


def check_place(address: str | None, resources: ResourcesSection) -> None:
    """Check the cluster's address, or this machine if `address` is None, without using Ray.

    Raises:
        UserError: nothing listens at the address, or this machine is too small for a trial.
    """
    if address is None:
        check_machine(resources)
    else:
        check_listening(address)


def _no_cluster(address: str, reason: str) -> UserError:
    return UserError(
        f"--address {address}: no Ray cluster is reachable there ({reason}); start one with "
        "`ray start --head`, or omit --address"
    )


@contextmanager
def ray_cluster(
    address: str | None,
    resources: ResourcesSection,
    code: Sequence[Path] = (),
    check: bool = True,
) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine; shut down or disconnect on exit.

    If this process is already connected, keep that connection and leave it open.

    Args:
        address: address of the cluster; None starts a local cluster.
        resources: resources of one trial.
        code: modules and packages to ship to the nodes of a remote cluster.
        check: whether to check that one trial fits on a node.

    Yields:
        Nothing; Ray is connected within the context.

    Raises:
        UserError: no cluster is reachable at the address, or no node is large enough for a trial.
        RuntimeError: Ray did not start on this machine.
    """
    set_ray_defaults()
    if address is not None:
        check_listening(address)
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            yield
            return
    with _auth_mode(address):
        yield from _connected(address, resources, code, check)


@contextmanager
def _auth_mode(address: str | None) -> Iterator[None]:
    """Make Ray send a token only if the cluster requires one; restore the mode on exit.

    `ray.init` without an address sets the mode for the rest of the process, which could then no
    longer connect to a cluster that requires no token.
    """
    before = os.environ.get(AUTH_MODE)
    try:
        if address is not None and before is None and token_exists():
            os.environ[AUTH_MODE] = "disabled" if _is_open(address) else "token"
        if "ray" in sys.modules:
            _reread_settings()
        yield
    finally:
        if before is None:
            os.environ.pop(AUTH_MODE, None)
        else:
            os.environ[AUTH_MODE] = before
        _reread_settings()


def _reread_settings() -> None:
    from nipq_search.search.backend.ray_compat import reread_settings

    reread_settings()


def _connected(
    address: str | None, resources: ResourcesSection, code: Sequence[Path], check: bool
) -> Iterator[None]:
    """Connect, yield and disconnect; see `ray_cluster`."""
    import ray

    from nipq_search.search.backend.ray_compat import GCS_RECONNECT_TIMEOUT, loopback_only

    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "ignore_reinit_error": True,
    }
    if address is None:
        # "local" overrides RAY_ADDRESS, which would silently connect to an existing cluster.
        options |= {"include_dashboard": False, "address": "local"}
        # The head of the cluster dies with this process. Ray's other processes try to reconnect
        # for this many seconds and would otherwise outlive a killed driver by minutes.
        os.environ.setdefault(GCS_RECONNECT_TIMEOUT, "2")
    else:
        options["address"] = address
        if code and can_ship_code():
            modules = [str(path) for path in code]
            options["runtime_env"] = {"py_modules": modules, "excludes": EXCLUDES}
    with ExitStack() as own:
        if address is None:
            own.enter_context(loopback_only())
            own.enter_context(reap_ray_processes())
        _start(options, address)
        try:
            if check:
                check_trial_fits(resources, grows=address is not None and resources.autoscale)
            yield
        finally:
            ray.shutdown()


def _start(options: dict[str, Any], address: str | None) -> None:
    """Start Ray on this machine, or connect to a cluster; see `ray_cluster`."""
    import ray

    from nipq_search.search.backend.ray_compat import check_head

    try:
        if address is not None and address.rpartition(":")[2].isdigit():
            check_head(address)
        ray.init(**options)
    except Exception as error:  # Ray raises a plain Exception if a node does not start
        reason = " ".join(str(error).split())[:200]
        if address is None:
            raise RuntimeError(
                f"Ray did not start on this machine ({reason}), which may be out of memory or "
                "overloaded; run the same command again"
            ) from error
        raise _no_cluster(address, reason) from error


def _trainable(config: dict[str, Any], task: Any = None, work: Any = None) -> None:
    """Execute one job in a Tune worker and report its outcome to Tune."""
    from ray import tune

    from nipq_search.search.worker.worker import execute

    outcome = (work or execute)(Job(**config["job"]), task, tune.report)
    tune.report(outcome.as_report())


class TuneExecutor:
    """Runs jobs as Ray Tune trials.

    Args:
        resources: resources of each job.
        work: executes a job in its process; None selects `worker.execute`.
    """

    def __init__(self, resources: ResourcesSection, work: Work | None = None) -> None:
        """Store the arguments; nothing is started."""
        self.resources, self.work = resources, work

    def run(self, coordinator: Coordinator, task: Task, tick: Callable[[], None]) -> None:
        """Run the coordinator's jobs; see `Executor`.

        Args:
            coordinator: source of the jobs.
            task: the sweep's task with its data loaded.
            tick: called at most every 0.5 s, after an iteration of Tune's event loop.

        Raises:
            BaseException: an error raised by `tick`, or by the coordinator when a job ended.
        """
        from ray import tune
        from ray.tune import FailureConfig, RunConfig, TuneConfig

        from nipq_search.search.backend.ray_compat import ray_errors_as_actor_deaths
        from nipq_search.search.backend.tune_callbacks import (
            JobSearcher,
            StopWhenIdle,
            Ticker,
        )

        trainable = tune.with_resources(
            tune.with_parameters(_trainable, task=task, work=self.work),
            {
                {"CPU": "cpu", "GPU": "gpu"}.get(name, name): amount
                for name, amount in self.resources.ray_resources().items()
            },
        )
        searcher = JobSearcher(coordinator)
        ticker = Ticker(tick, searcher)
        scratch = Path(tempfile.mkdtemp(prefix="nipq-tune-"))
        try:
            tuner = tune.Tuner(
                trainable,
                tune_config=TuneConfig(
                    search_alg=searcher,
                    num_samples=-1,
                    max_concurrent_trials=slots(self.resources),
                    reuse_actors=True,
                ),
                run_config=RunConfig(
                    name="jobs",
                    storage_path=str(scratch),
                    failure_config=FailureConfig(max_failures=-1),  # JobSearcher limits retries
                    callbacks=[ticker],
                    stop=StopWhenIdle(coordinator, ticker),
                    verbose=0,
                ),
            )
            if coordinator.has_work():
                with ray_errors_as_actor_deaths():
                    tuner.fit()
            if searcher.problem is not None:
                raise searcher.problem
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
