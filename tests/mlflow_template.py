"""MLflow's tables in a new SQLite database, copied instead of migrated.

The 68 migrations of an empty database take longer than a tiny sweep. Each process runs them once
to create a template, which it copies into every other empty database. Servers and commands
started from the command line migrate their own databases.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from pathlib import Path
from typing import Any


def use_template() -> None:
    """Copy the template into every empty SQLite database that this process opens from now on."""
    from mlflow.store.db import utils

    if utils._initialize_tables.__module__ != utils.__name__:
        return  # called before
    folder = tempfile.TemporaryDirectory(prefix="nipq-mlflow-")
    migrate = utils._initialize_tables

    def template() -> Path:
        path = Path(folder.name) / "mlflow.db"
        if not path.exists():
            migrate(utils.create_sqlalchemy_engine_with_retry(f"sqlite:///{path}"))
        return path

    def copy(engine: Any) -> None:
        if engine.dialect.name != "sqlite":
            migrate(engine)
            return
        with contextlib.closing(sqlite3.connect(template())) as source:
            connection = engine.raw_connection()
            source.backup(connection.driver_connection)
            connection.close()

    utils._initialize_tables = copy
