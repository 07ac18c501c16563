"""Where the study lies: a journal in the sweep's folder, or a database by URL."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from nipq_search import storage
from nipq_search.errors import UserError

JOURNAL, DATABASE = "study.log", "study.db"
IDENTITY = "identity"
"""Study attribute: what tells a study from others of the same name; `study` in `facts.json`."""
_SILENCE = {
    "connect_timeout": 10,
    # A server that vanishes without a word, as behind a cut cable, would hold a query for minutes.
    "tcp_user_timeout": 20_000,  # milliseconds for what was sent to be acknowledged
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
}
"""How long libpq, and so psycopg, waits for a server; seconds but for one."""


def storage_url() -> str | None:
    """The study's URL from the environment, or None for a file in the sweep's folder.

    Raises:
        UserError: `NIPQ_STORAGE_URL_FILE` cannot be read.
    """
    return storage.setting("NIPQ_STORAGE_URL")


def engine_options(url: str) -> dict[str, Any]:
    """What SQLAlchemy is given beside a URL: lost connections are made anew, silent hosts end."""
    driver = url.partition("://")[0]
    by_libpq = driver in ("postgres", "postgresql") or "+psycopg" in driver
    return {"pool_pre_ping": True, "connect_args": dict(_SILENCE) if by_libpq else {}}


def open_storage(folder: Path) -> BaseStorage:
    """The study's storage.

    Raises:
        UserError: the URL does not answer (the message holds no password), or the journal is
            damaged.
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
            raise UserError(
                f"NIPQ_STORAGE_URL: the study's storage does not answer ({kind}); check scheme, "
                "host, user, password and that the server runs"
            ) from error
        journal = (folder / JOURNAL).resolve()
        try:
            return JournalStorage(JournalFileBackend(str(journal)))
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            raise UserError(
                f"{journal}: {_damaged(journal)} is damaged "
                f"({' '.join(str(error).split())[:120]}); restore the file from a copy: without "
                "the line, the study loses what it says of a trial"
            ) from error


class StudyGone(UserError):
    """The study of a sweep is not where the folder or the environment says."""


def load_study(
    folder: Path, name: str, identity: str | None = None
) -> tuple[optuna.Study, BaseStorage]:
    """A sweep's study and its storage, which is to be closed; nothing is created.

    Args:
        folder: the sweep's.
        name: the study's.
        identity: of the study with which the folder was made; None where nobody noted it.

    Raises:
        StudyGone: there is none.
        UserError: it is another study of the same name, or see `open_storage`.
    """
    gone = StudyGone(
        f"{folder}: the study '{name}' of its trials is gone; restore study.log, or set "
        "NIPQ_STORAGE_URL as it was when the sweep began, or give another folder"
    )
    if storage_url() is None and not any((folder / file).exists() for file in (JOURNAL, DATABASE)):
        raise gone
    storage = open_storage(folder)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
        own = json.loads(study.user_attrs.get(IDENTITY, "null"))
        if identity is not None and own != identity:
            raise UserError(
                f"{folder}: holds trials of another study; give another folder, or the "
                "NIPQ_STORAGE_URL that the sweep began with (unset for the folder's own study)"
            )
    except KeyError as error:
        close_storage(storage)
        raise gone from error
    except BaseException:
        close_storage(storage)
        raise
    return study, storage


def _damaged(journal: Path) -> str:
    """The first line that is no entry of a journal."""
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
    """End a server's connections, which nobody else would."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()
