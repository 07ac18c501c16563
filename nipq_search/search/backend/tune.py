"""The executor that runs jobs on Ray Tune, and the Ray cluster below it.

Tune starts and restarts processes, nothing more: what runs next, what a result means and what is
resumed is the coordinator's business, so Tune's own experiment state is scratch.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nipq_search.errors import UserError
from nipq_search.search.backend.base import Work
from nipq_search.search.backend.code_shipping import EXCLUDES, can_travel
from nipq_search.search.backend.nodes import check_room, slots
from nipq_search.search.backend.reaper import reaped
from nipq_search.search.config.resources import ResourcesSection
from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.jobs import Job
from nipq_search.tasks import Task


def quiet_environment() -> None:
    """Settings that Ray reads from the environment: no telemetry, no console noise."""
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
    """Whether this machine has a token for Ray clusters, where Ray looks for it."""
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return given or (Path.home() / ".ray" / "auth_token").is_file()


def _is_open(address: str) -> bool:
    """Whether a cluster answers without a token.

    `ray start` demands the token of a machine that has one, other ways to start a cluster do not.
    `ray.init` sends none of itself, and one that is sent where none is wanted breaks the way back.
    Ray reads the mode once per process, so another one asks.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    command += [] if address == "auto" else ["--address", address]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def check_machine(resources: ResourcesSection) -> None:
    """Check that this machine holds one trial, before Ray is started on it.

    Raises:
        UserError: it has too few cores or GPUs.
    """
    import torch

    wanted = resources.in_ray_s_words()
    for name, most in {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}.items():
        if wanted.get(name, 0) > most:
            raise UserError(
                f"resources.{resources.key_of(name)}: {wanted[name]:g} asked for one trial, this "
                f"machine has {most}"
            )


def check_reachable(address: str) -> None:
    """Check that something listens where a cluster should be: Ray itself waits for it without end.

    Raises:
        UserError: nothing does.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # `auto`: Ray knows where to look
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from error


def check_place(address: str | None, resources: ResourcesSection) -> None:
    """Check what can be checked of machines before anything starts.

    Raises:
        UserError: this machine is too small for a trial, or nothing listens at the address.
    """
    if address is None:
        check_machine(resources)
    else:
        check_reachable(address)


def _no_cluster(address: str, reason: str) -> UserError:
    return UserError(
        f"--address {address}: no Ray cluster answers there ({reason}); start one with "
        "`ray start --head`, or leave --address out"
    )


@contextmanager
def ray_cluster(
    address: str | None,
    resources: ResourcesSection,
    code: Sequence[Path] = (),
    check: bool = True,
) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine and end it afterwards.

    Args:
        address: of the cluster; None starts one.
        resources: what a trial needs of a node.
        code: modules and packages that a cluster's nodes are sent.
        check: whether some node must hold one trial.

    Raises:
        UserError: no cluster at the address, or no node that holds one trial.
    """
    quiet_environment()
    if address is not None:
        check_reachable(address)
    if address is not None and token_exists() and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "disabled" if _is_open(address) else "token"
    import ray

    from nipq_search.search.backend.ray_compat import loopback_only

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "ignore_reinit_error": True,
    }
    if address is None:
        # An address in the environment would silently lead to somebody's cluster.
        options |= {"include_dashboard": False, "address": "local"}
        # The cluster's head dies with this process. Whatever Ray started besides looks for it so
        # many seconds at a time, and would otherwise outlive a killed driver by minutes.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "2")
    else:
        options["address"] = address
        if code and can_travel():
            modules = [str(path) for path in code]
            options["runtime_env"] = {"py_modules": modules, "excludes": EXCLUDES}
    with ExitStack() as own:
        if address is None:
            own.enter_context(loopback_only())
            own.enter_context(reaped())
        _start(options, address)
        try:
            if check:
                check_room(resources, grows=address is not None and resources.autoscale)
            yield
        finally:
            ray.shutdown()


def _start(options: dict[str, Any], address: str | None) -> None:
    """Start Ray here, or connect to a cluster; see `ray_cluster`."""
    import ray

    from nipq_search.search.backend.ray_compat import connect_to_gcs

    try:
        if address is not None and address.rpartition(":")[2].isdigit():
            connect_to_gcs(address)
        ray.init(**options)
    except Exception as error:  # Ray raises the bare class where a node does not start
        reason = " ".join(str(error).split())[:200]
        if address is None:
            raise RuntimeError(
                f"Ray did not start on this machine ({reason}); is it out of memory or very busy? "
                "The same command tries again"
            ) from error
        raise _no_cluster(address, reason) from error


def _trainable(config: dict[str, Any], task: Any = None, work: Any = None) -> None:
    """What Tune runs in a worker: one job, to its committed record."""
    from ray import tune

    from nipq_search.search.worker.worker import execute

    outcome = (work or execute)(Job(**config["job"]), task, tune.report)
    tune.report(outcome.as_report())


class TuneExecutor:
    """Runs jobs as Ray Tune trials.

    Args:
        resources: what each job gets.
        work: does a job, in its process; by default what a worker does.
    """

    def __init__(self, resources: ResourcesSection, work: Work | None = None) -> None:
        """Remember what jobs need; nothing is started yet."""
        self.resources, self.work = resources, work

    def run(self, coordinator: Coordinator, task: Task, tick: Callable[[], None]) -> None:
        """See `Executor`."""
        from ray import tune
        from ray.tune import FailureConfig, RunConfig, TuneConfig

        from nipq_search.search.backend.ray_compat import memory_faults
        from nipq_search.search.backend.tune_callbacks import (
            JobSearcher,
            NothingRuns,
            Ticker,
        )

        trainable = tune.with_resources(
            tune.with_parameters(_trainable, task=task, work=self.work),
            {
                {"CPU": "cpu", "GPU": "gpu"}.get(name, name): amount
                for name, amount in self.resources.in_ray_s_words().items()
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
                    failure_config=FailureConfig(max_failures=-1),  # see JobSearcher.recovers
                    callbacks=[ticker],
                    stop=NothingRuns(coordinator, ticker),
                    verbose=0,
                ),
            )
            if coordinator.has_work():
                with memory_faults():
                    tuner.fit()
            if searcher.problem is not None:
                raise searcher.problem
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
