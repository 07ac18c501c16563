"""The connection to MLflow: address, experiment and location of artifacts.

Without `MLFLOW_TRACKING_URI`, runs are stored in the SQLite file `mlflow.db` in the sweep's
folder. Their artifacts are recorded under `mlflow-artifacts:`, MLflow's scheme for files served by
its server, and written to the folder that this server reads by default, `mlartifacts/` next to the
database. No absolute path is stored, so `cd DIR && mlflow ui` also works after DIR has been moved
or copied. A remote server stores artifacts itself.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipq_search.file_io import setting, write_bytes

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

EXPERIMENT = "nipq_search"
"""The experiment that all sweeps on a server share; `recorder` explains why."""

PROXY = "mlflow-artifacts:/"

DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Defaults for environment variables. An unavailable server must not block the search, and a retry
by MLflow could repeat a request that has already arrived, such as the creation of a run."""


def tracking_uri(out: Path, uri: str | None = None) -> str:
    """Return the URI of the server.

    This is `uri` if it is given, otherwise the URI set in the environment, and otherwise that of a
    SQLite file in `out`.

    Raises:
        UserError: the file that `MLFLOW_TRACKING_URI_FILE` names cannot be read or is empty.
    """
    return uri or environment_uri() or local_uri(out)


def environment_uri() -> str | None:
    """Return the URI of the server from the environment, or None if it is not set there.

    The URI is the value of `MLFLOW_TRACKING_URI`, or the content of the file that
    `MLFLOW_TRACKING_URI_FILE` names. The variant with a file exists because a database URI may
    contain a password, and Ray's dashboard displays the environment variables of jobs.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    return setting("MLFLOW_TRACKING_URI")


def local_uri(out: Path) -> str:
    """Return the URI of the SQLite file `mlflow.db` in the sweep's folder `out`."""
    return f"sqlite:///{out.absolute()}/mlflow.db"


def open_client(uri: str) -> MlflowClient:
    """Return a client for `uri`; a missing SQLite database is created.

    Raises:
        Exception: MLflow cannot open the database.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # MLflow logs each migration at INFO level while it creates a database.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # MLflow's use of its own dependencies causes warnings that cannot be fixed here.
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        folder = _database_folder(uri)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return MlflowClient(uri)


def experiment_id(client: MlflowClient, uri: str, out: Path) -> str:
    """Find or create the experiment that all sweeps share, and return its ID.

    If a database is accessed without a server, a new experiment stores its artifacts in a folder
    `mlartifacts/`: next to a SQLite file, or in `out` for other databases.

    Args:
        client: the MLflow client.
        uri: URI of the server.
        out: the sweep's folder.

    Returns:
        The experiment's ID.

    Raises:
        RuntimeError: the experiment has been deleted; MLflow reserves its name until it is
            restored or permanently removed.
    """
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise RuntimeError(
                f"the MLflow experiment {EXPERIMENT!r} has been deleted; restore it with "
                f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
            )
        return str(found.experiment_id)
    location = None
    if _database_folder(uri) is not None:
        location = f"{PROXY}{EXPERIMENT}"
    elif not uri.startswith(("http://", "https://")):
        location = (out.absolute() / "mlartifacts").as_uri()
    return str(client.create_experiment(EXPERIMENT, artifact_location=location))


def store_artifact(client: MlflowClient, uri: str, run: Run, name: str, data: bytes) -> None:
    """Store an artifact, replacing any existing artifact with the same name.

    Args:
        client: the MLflow client.
        uri: URI of the server.
        run: the run that the artifact belongs to.
        name: file name of the artifact.
        data: content of the artifact.

    Raises:
        OSError: the disk is full or not writable.
        Exception: MLflow cannot reach the server.
    """
    folder = _database_folder(uri)
    location = str(run.info.artifact_uri)
    if folder is not None and location.startswith(PROXY):
        write_bytes(folder / "mlartifacts" / location.removeprefix(PROXY) / name, data)
        return
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / name
        path.write_bytes(data)
        client.log_artifact(run.info.run_id, str(path))


def context_tags() -> dict[str, str]:
    """Return MLflow's standard tags for the user, the program and, if known, the commit."""
    tags = {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
    }
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (OSError, KeyError):  # the user in a container may have no name
        tags["mlflow.user"] = "unknown"
    commit = git_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    return tags


def git_commit(folder: Path | None = None) -> str | None:
    """Return the hash of the commit that is checked out, or None.

    The result is None if the folder is not in a Git repository, or if Git is not installed or
    fails.

    Args:
        folder: a folder in the working tree; None stands for the working directory.
    """
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def dataset_input(dataset: Mapping[str, Any]) -> Any:
    """Convert `dataset` (name, digest, sizes) to a DatasetInput with the context `training`."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name = str(dataset.get("name") or "data")[:500]
    source = str(dataset.get("source") or name)
    return DatasetInput(
        dataset=Dataset(
            name=name,
            digest=str(dataset.get("digest") or "unknown")[:36],
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps(dict(dataset), default=str),
        ),
        tags=[InputTag(key="mlflow.data.context", value="training")],
    )


def _database_folder(uri: str) -> Path | None:
    """Return the folder of the SQLite database at `uri`, or None if `uri` is not a SQLite URI."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").split("?")[0]).absolute().parent
