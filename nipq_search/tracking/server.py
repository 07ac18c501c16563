"""The connection to MLflow: where the server is, its experiment, and where artifacts go.

Without `MLFLOW_TRACKING_URI`, runs go to the SQLite file `mlflow.db` in the sweep's folder.
Their artifacts are recorded under `mlflow-artifacts:`, MLflow's scheme for files that its server
hands out, and are written where that server looks for them: in `mlartifacts/` beside the
database. No absolute path is stored, so `cd DIR && mlflow ui` shows everything even after DIR
has been moved or copied. A real server stores artifacts itself.
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

from nipq_search.storage import setting, write_bytes

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

EXPERIMENT = "nipq_search"
"""The one experiment that all sweeps of a server share; see `recorder` for the reason."""

PROXY = "mlflow-artifacts:/"

DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Environment that is set unless the user did: a server that is away must not hold the search, and
MLflow would send again what may have arrived, such as the request for a new run."""


def tracking_uri(out: Path, uri: str | None = None) -> str:
    """The server to write to: `uri`, else that of the environment, else SQLite in `out`.

    Raises:
        UserError: `MLFLOW_TRACKING_URI_FILE` cannot be read.
    """
    return uri or given_uri() or own_uri(out)


def given_uri() -> str | None:
    """`MLFLOW_TRACKING_URI`, or what is in the file that `MLFLOW_TRACKING_URI_FILE` names.

    A database's URL holds a password, and Ray's dashboard shows the environment of jobs.

    Raises:
        UserError: the file cannot be read.
    """
    return setting("MLFLOW_TRACKING_URI")


def own_uri(out: Path) -> str:
    """URI of the SQLite file in the sweep's own folder."""
    return f"sqlite:///{out.absolute()}/mlflow.db"


def open_client(uri: str) -> MlflowClient:
    """Connect to `uri`; a SQLite database is created where there is none.

    Raises:
        Exception: whatever MLflow raises for a database that it cannot open.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # A new database reports each of its migrations at INFO.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # MLflow's own use of its dependencies is no concern of ours, or of ours to fix.
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        folder = _database_folder(uri)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return MlflowClient(uri)


def experiment_id(client: MlflowClient, uri: str, out: Path) -> str:
    """Find or create the experiment and return its id.

    A database that is written without a server in between has nobody who stores artifacts:
    beside SQLite they lie in `mlartifacts/`, for any other database in the folder `out`.

    Raises:
        RuntimeError: somebody deleted the experiment; MLflow keeps the name until it is
            restored or removed for good.
    """
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise RuntimeError(
                f"the MLflow experiment {EXPERIMENT!r} has been deleted; bring it back with "
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
    """Store `data` as artifact `name` of `run`, in place of an older one.

    Raises:
        OSError: the disk is full or not writable.
        Exception: whatever MLflow raises when a server cannot be reached.
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
    """MLflow's own tags for who ran what from which commit, as far as they can be told."""
    tags = {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
    }
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (OSError, KeyError):  # a container may run under a user without a name
        tags["mlflow.user"] = "unknown"
    commit = git_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    return tags


def git_commit(folder: Path | None = None) -> str | None:
    """Hash of the commit that `folder` (the working directory) is on, or None."""
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def dataset_input(dataset: Mapping[str, Any]) -> Any:
    """`dataset` (name, digest, sizes) as MLflow's DatasetInput in the context `training`."""
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
    """Folder of a SQLite database, or None for any other kind of server."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").split("?")[0]).absolute().parent
