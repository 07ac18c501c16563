"""Checks before a sweep starts: its folder, databases, checkpoint storage, task and data."""

from __future__ import annotations

import re
from pathlib import Path

from nipq_search import blobs, file_io
from nipq_search.errors import UserError
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.jobs import FACTS_FILE, SWEEP_FILE
from nipq_search.search.results.sweep import Sweep, is_sweep
from nipq_search.search.study.storage import DATABASE, storage_url
from nipq_search.tasks import Task, make_task
from nipq_search.tasks.base import has_distillation, load_data
from nipq_search.tracking.server import tracking_uri

_IGNORED_FILES = {"driver.lock", "stop.request"}
_UNFINISHED = (f".{FACTS_FILE}.", f".{SWEEP_FILE}.")
"""Prefixes of temporary files that a killed process leaves; see `file_io.write_bytes`."""


def _sweep_name(out: Path) -> str | None:
    """Return the name of the sweep in a folder; None if the folder contains no readable sweep."""
    try:
        return str(Sweep.open(out).config["name"])
    except (UserError, KeyError):
        return None


def check_folder(out: Path, name: str) -> None:
    """Check that a folder can store the sweep `name`; it need not exist.

    Raises:
        UserError: the path is a file, or the folder contains other data or another sweep.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: this is a file; give a folder")
    files = {p.name for p in out.iterdir() if not p.name.startswith(_UNFINISHED)}
    found = files - _IGNORED_FILES
    known = {SWEEP_FILE, FACTS_FILE, "study.log", "study.db"}
    if found and not is_sweep(out) and not found & known:
        raise UserError(
            f"--out {out}: not empty and not a sweep (it contains {min(found)!r}); "
            "give another folder"
        )
    if (held := _sweep_name(out)) not in (None, name):
        raise UserError(
            f"--out {out}: contains the sweep '{held}', not '{name}'; give another folder"
        )


def check_databases(out: Path) -> None:
    """Check that no SQLite database of the sweep is in memory or on a network file system.

    Raises:
        UserError: a database is in one of these places; the message names the variable to set.
    """
    wanted = [("NIPQ_STORAGE_URL", storage_url() or "", DATABASE)]
    wanted += [("MLFLOW_TRACKING_URI", tracking_uri(out), "mlflow.db")]
    for variable, uri, name in wanted:
        if re.fullmatch(r"sqlite(\+\w+)?:(//|///|///:memory:)(\?.*)?", uri):
            raise UserError(
                f"{variable}: {uri} is an in-memory database; name a file, such as sqlite:////a/b.db"
            )
        dialect, _, place = uri.partition(":///")
        sqlite = dialect.partition("+")[0] == "sqlite"
        file = Path(place.partition("?")[0]) if sqlite else None
        if not uri and (out / name).exists():
            file = out / name
        if file is not None and (kind := file_io.network_file_system_type(file)):
            raise UserError(
                f"{file}: SQLite on a network file system ({kind}) can lose data; set {variable} "
                "to a server's URL, such as postgresql+psycopg://USER:PASSWORD@HOST:PORT/NAME, "
                "or choose a local --out"
            )


def check_checkpoints(home: str | None) -> None:
    """Check that the object store for models and checkpoints can be written and read.

    If `home` is None, there is no object store, and nothing is checked.

    Raises:
        UserError: an operation on the store failed, or pyarrow is not installed.
    """
    try:
        if home is not None:
            blobs.check_store(home)
    except OSError as error:
        raise UserError(
            f"checkpoints: {error.strerror or error}; check the URI and the keys in the "
            "environment, and that the object store responds"
        ) from error


def load_task(config: SweepConfig) -> Task:
    """Create the sweep's task and load its data.

    Raises:
        UserError: the task or its data cannot be loaded, or `train.distill` is set, but the task
            has no distillation loss.
    """
    task = make_task(config.task, config.task_args)
    load_data(task)
    if config.train.distill and not has_distillation(task):
        raise UserError(
            f"train.distill: task {config.task} has no distill_loss; set train.distill to false"
        )
    return task
