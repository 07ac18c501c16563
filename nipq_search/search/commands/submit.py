"""A sweep as a Ray job: the driver runs on the cluster's head, and outlives this machine."""

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
from nipq_search.search.backend.code_shipping import EXCLUDES, can_travel, sources
from nipq_search.search.backend.tune import quiet_environment, token_exists
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.jobs import SWEEP_FILE

_PATIENCE_SECONDS = 60.0


def command_of(name: str, out: str | None, overrides: Sequence[str], trials: int | None) -> str:
    """What the job runs, in a shell on the head."""
    # A folder below the home of the head's user, which its shell knows.
    folder = out or f"~/runs/{name}"
    if folder.startswith("~/"):  # quoted, the tilde would be a folder's name
        folder = "/".join(["~", *map(shlex.quote, folder.removeprefix("~/").split("/"))])
    else:
        folder = shlex.quote(folder)
    words = ["python", "-m", "nipq_search.cli", "run", SWEEP_FILE, "--address", "auto"]
    words += [word for text in overrides for word in ("--set", text)]
    words += [] if trials is None else ["--trials", str(trials)]
    return f"{shlex.join(words)} --out {folder}"


def _stage(folder: Path, config_file: Path, task: str) -> None:
    """Copy what the job needs: the sweep file, this package, the task's module or package."""
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
    """Hand a sweep to a cluster as a job.

    Nothing of this process's environment goes with it: the job would show it. Secrets belong into
    the environment of the head, or into files there.

    Args:
        config_file: the sweep file, which is sent as it is.
        config: the same, checked.
        address: of the head's dashboard, such as `http://HEAD:8265`.
        out: the sweep's folder on the head, absolute; default `~/runs/<name>` there.
        overrides: as `--set` takes them.
        trials: trials in all.

    Returns:
        The job's id.

    Raises:
        UserError: the address is none, nothing answers there, or the installation lacks
            `ray[default]`.
    """
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address}: give the head's dashboard, such as http://HEAD:8265 (`run` "
            "takes HOST:PORT of the cluster itself)"
        )
    if out is not None and not out.startswith(("/", "~/")):
        raise UserError(f"--out {out}: give an absolute folder of the head, or one below ~/")
    if not can_travel():
        raise UserError("submit: needs Ray's job parts: python -m pip install 'ray[default]'")
    quiet_environment()
    if token_exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    with tempfile.TemporaryDirectory(prefix="nipq-submit-") as staged:
        _stage(Path(staged), config_file, config.task)
        job = {
            "entrypoint": command_of(config.name, out, overrides, trials),
            "runtime_env": {"working_dir": staged},
            "metadata": {"sweep": config.name},
        }
        try:
            client = JobSubmissionClient(address)
            logging.getLogger("ray").setLevel(logging.ERROR)  # the client has just set it to INFO
            return _send(client, job)
        except (ConnectionError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--address {address}: no Ray dashboard takes jobs there ({reason}); start the "
                "head with `ray start --head`, which needs ray[default]"
            ) from error


def _send(client: Any, job: Mapping[str, Any]) -> str:
    """Submit a job; a head that has just started needs some seconds until it takes one."""
    limit = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "try again" not in str(error) or time.monotonic() > limit:
                raise
        time.sleep(1)
