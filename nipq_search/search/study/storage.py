"""The study's storage: a journal or a database in the sweep's folder, or a database at a URL."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from nipq_search import file_io
from nipq_search.errors import UserError

JOURNAL, DATABASE = "study.log", "study.db"
IDENTITY = "identity"
"""Study attribute that distinguishes studies of the same name; also `study` in `facts.json`."""

_TIMEOUTS = {
    "connect_timeout": 10,
    # Without these, a query would wait for minutes when the network connection is cut.
    "tcp_user_timeout": 20_000,  # milliseconds until sent data must be acknowledged
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
}
"""Connection timeouts of libpq, and thus of psycopg, in seconds unless noted otherwise."""


def storage_url() -> str | None:
    """Return the study's URL from the environment, or None for a file in the sweep's folder.

    Raises:
        UserError: `NIPQ_STORAGE_URL_FILE` names a file that is unreadable or empty.
    """
    return file_io.setting("NIPQ_STORAGE_URL")


def engine_options(url: str) -> dict[str, Any]:
    """Return SQLAlchemy engine options that replace dropped connections.

    With PostgreSQL, connections also time out if the server does not respond.
    """
    driver = url.partition("://")[0]
    by_libpq = driver in ("postgres", "postgresql") or "+psycopg" in driver
    return {"pool_pre_ping": True, "connect_args": dict(_TIMEOUTS) if by_libpq else {}}


def open_storage(folder: Path) -> BaseStorage:
    """Open the study's storage: a database if there is one, otherwise a journal.

    A missing journal is created.

    Raises:
        UserError: the storage is unreachable or cannot be opened (the message contains no
            password), or the journal is damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        url = storage_url()
        try:
            if url is not None:
                return RDBStorage(url, engine_kwargs=engine_options(url))
            if (folder / DATABASE).exists():
                return RDBStorage(f"sqlite:///{(folder / DATABASE).resolve()}")
        except Exception as error:
            kind = type(error).__name__
            if url is None:
                raise UserError(
                    f"{folder / DATABASE}: the study's database cannot be opened ({kind}); "
                    "restore the file from a backup"
                ) from error
            raise UserError(
                f"NIPQ_STORAGE_URL: the study's storage is unreachable ({kind}); check the "
                "scheme, host, user and password, and that the server is running"
            ) from error
        journal = (folder / JOURNAL).resolve()
        try:
            return JournalStorage(JournalFileBackend(str(journal)))
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            raise UserError(
                f"{journal}: {_damaged_line(journal)} is damaged "
                f"({' '.join(str(error).split())[:120]}); restore the file from a backup: "
                "deleting the line would lose what it records about a trial"
            ) from error


class StudyNotFound(UserError):
    """The study of a sweep does not exist in its folder or at the configured URL."""


def load_study(
    folder: Path, name: str, identity: str | None = None
) -> tuple[optuna.Study, BaseStorage]:
    """Load a sweep's study without creating anything.

    Args:
        folder: the sweep's folder.
        name: name of the study.
        identity: identity of the study with which the folder was created; None if unknown.

    Returns:
        The study, and its storage, which the caller must close.

    Raises:
        StudyNotFound: the study does not exist.
        UserError: a different study has this name, or the storage cannot be opened; see
            `open_storage`.
    """
    gone = StudyNotFound(
        f"{folder}: the study '{name}' with its trials is gone; restore study.log, or set "
        "NIPQ_STORAGE_URL to the value that the sweep began with, or use another folder"
    )
    if storage_url() is None and not any((folder / file).exists() for file in (JOURNAL, DATABASE)):
        raise gone
    storage = open_storage(folder)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
        own = json.loads(study.user_attrs.get(IDENTITY, "null"))
        if identity is not None and own != identity:
            raise UserError(
                f"{folder}: holds trials of another study; use another folder, or set "
                "the NIPQ_STORAGE_URL that the sweep began with (unset it if there was none)"
            )
    except KeyError as error:
        close_storage(storage)
        raise gone from error
    except BaseException:
        close_storage(storage)
        raise
    return study, storage


def _damaged_line(journal: Path) -> str:
    """Return text for the first invalid line of a journal: `line 3`, or `a line` if unknown."""
    with journal.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if "op_code" in json.loads(line):
                    continue
            except (ValueError, TypeError):
                pass
            return f"line {number}"
    return "a line"


def close_storage(storage: BaseStorage) -> None:
    """Close the connections to a database, which Optuna leaves open; a journal has none."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()
