"""`submit`: runs a sweep as a Ray job, whose driver runs on the cluster's head node."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nipq_search.errors import UserError
from nipq_search.search.backend.code_shipping import EXCLUDES, can_ship_code, sources
from nipq_search.search.backend.tune import set_ray_defaults, token_exists
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.jobs import SWEEP_FILE

_SUBMIT_TIMEOUT_SECONDS = 60.0
"""How long to retry the submission, because a head that has just started may refuse jobs."""


def run_command(name: str, out: str | None, overrides: Sequence[str], trials: int | None) -> str:
    """Build the shell command that the job runs on the head.

    Args:
        name: the sweep's name.
        out: the sweep's folder on the head; defaults to `~/runs/<name>`.
        overrides: values of `--set`, as `A.B=C`.
        trials: total number of trials over all runs; None uses `search.trials`.

    Returns:
        The command line, quoted for a POSIX shell.
    """
    # The shell on the head expands the tilde to the home folder of its own user.
    folder = out or f"~/runs/{name}"
    if folder.startswith("~/"):  # a quoted tilde would not be expanded
        folder = "/".join(["~", *map(shlex.quote, folder.removeprefix("~/").split("/"))])
    else:
        folder = shlex.quote(folder)
    words = ["python", "-m", "nipq_search.cli", "run", SWEEP_FILE, "--address", "auto"]
    words += [word for text in overrides for word in ("--set", text)]
    words += [] if trials is None else ["--trials", str(trials)]
    return f"{shlex.join(words)} --out {folder}"


def _stage(folder: Path, config_file: Path, task: str) -> None:
    """Copy the sweep file, this package and the task's module or package into `folder`."""
    shutil.copy(config_file, folder / SWEEP_FILE)
    for source in sources(task):
        if source.is_dir():
            ignore = shutil.ignore_patterns(*EXCLUDES)
            shutil.copytree(source, folder / source.name, ignore=ignore)
        else:
            shutil.copy(source, folder / source.name)


def submit(
    config_file: Path,
    config: SweepConfig,
    address: str,
    *,
    out: str | None = None,
    overrides: Sequence[str] = (),
    trials: int | None = None,
) -> str:
    """Submit a sweep to a cluster as a Ray job.

    This process's environment variables are not passed on, because the job's description would
    expose them. Set secrets in the environment of the head, or in files there.

    Args:
        config_file: the sweep file, sent unchanged.
        config: the validated content of the file.
        address: URL of the head's dashboard, such as `http://HEAD:8265`.
        out: the sweep's folder on the head, absolute or below `~/`; defaults to `~/runs/<name>`.
        overrides: values of `--set`, as `A.B=C`.
        trials: total number of trials over all runs; None uses `search.trials`.

    Returns:
        The job's ID.

    Raises:
        UserError: the address or folder is malformed, no dashboard accepts jobs at the address,
            or `ray[default]` is not installed.
    """
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address}: give the URL of the head's dashboard, such as "
            "http://HEAD:8265 (`run` takes HOST:PORT of the cluster itself)"
        )
    if out is not None and not out.startswith(("/", "~/")):
        raise UserError(f"--out {out}: give an absolute folder on the head, or one below ~/")
    if not can_ship_code():
        raise UserError(
            "submit: Ray's job client is missing; install it with: "
            "python -m pip install 'ray[default]'"
        )
    set_ray_defaults()
    if token_exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    with tempfile.TemporaryDirectory(prefix="nipq-submit-") as staged:
        _stage(Path(staged), config_file, config.task)
        job = {
            "entrypoint": run_command(config.name, out, overrides, trials),
            "runtime_env": {"working_dir": staged},
            "metadata": {"sweep": config.name},
        }
        try:
            client = JobSubmissionClient(address)
            logging.getLogger("ray").setLevel(logging.ERROR)  # the client sets it to INFO
            return _send(client, job)
        except (ConnectionError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--address {address}: no Ray dashboard accepts jobs there ({reason}); start the "
                "head with `ray start --head`, which requires ray[default]"
            ) from error


def _send(client: Any, job: Mapping[str, Any]) -> str:
    """Submit a job and return its ID; retry while a head that has just started refuses jobs."""
    limit = time.monotonic() + _SUBMIT_TIMEOUT_SECONDS
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "try again" not in str(error) or time.monotonic() > limit:
                raise
        time.sleep(1)
