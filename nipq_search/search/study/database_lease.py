"""The lease that admits one driver at a time to a study on a database server, from any host.

One table row per study stores the driver and its heartbeat, a counter that the driver increments
every few seconds. Clocks of different hosts are never compared: a second driver watches the
counter, and takes the row over by compare-and-swap only after the counter has been unchanged for
longer than a running driver ever pauses, or if the other driver's process has ended on the same
machine.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from nipq_search.errors import UserError
from nipq_search.file_io import digest
from nipq_search.search.study.storage import engine_options, storage_url

_log = logging.getLogger("nipq_search")

BEAT_SECONDS = 5.0
"""Interval between heartbeats."""

SILENT_SECONDS = 20.0
"""A driver considers its lease lost after this long without a successful heartbeat."""

EXPIRY_SECONDS = 40.0
"""A lease expires after this long without a heartbeat. The margin above `SILENT_SECONDS` covers a
write that the previous driver had already started."""

_now: Callable[[], float] = time.monotonic
"""Monotonic time in seconds; on Linux, it also advances while the machine is suspended."""
if hasattr(time, "CLOCK_BOOTTIME"):
    _now = functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME)

_TABLE = sa.Table(
    "nipq_lease",
    sa.MetaData(),
    sa.Column("study", sa.String(255), primary_key=True),
    sa.Column("token", sa.String(64), nullable=False),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("beat", sa.BigInteger, nullable=False),
)


class LeaseLost(RuntimeError):
    """Another driver may have taken the sweep over, so this one must stop writing."""


class StorageLease:
    """A held lease, renewed by a thread between `start` and `close`.

    Args:
        engine: the database.
        study: name of the study.
        token: token of this driver, under which it acquired the lease.
    """

    def __init__(self, engine: Engine, study: str, token: str) -> None:
        """Wrap an acquired lease; nothing is written before `start`."""
        self._engine, self._study, self._token = engine, study, token
        self._alive_at = _now()
        self._taken = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="nipq-lease", daemon=True)

    def start(self) -> None:
        """Start the heartbeat."""
        self._alive_at = _now()
        self._thread.start()

    def held(self) -> bool:
        """Return whether this driver still holds the lease, and thus may write."""
        return not self._taken and _now() - self._alive_at < SILENT_SECONDS

    def check(self) -> None:
        """Raise `LeaseLost` unless this driver still holds the lease."""
        if not self.held():
            raise LeaseLost(
                "this driver lost its lease: the study's server did not respond, or another "
                "driver took the sweep over; no results are lost; run the same command again to "
                "resume the sweep"
            )

    def _beat(self) -> None:
        mine = (_TABLE.c.study == self._study) & (_TABLE.c.token == self._token)
        while not self._end.wait(BEAT_SECONDS):
            asked_at = _now()
            try:
                with self._engine.begin() as connection:
                    moved = connection.execute(
                        _TABLE.update().where(mine).values(beat=_TABLE.c.beat + 1)
                    )
            except sa.exc.SQLAlchemyError as error:
                _log.warning("the lease could not be renewed: %s", type(error).__name__)
                continue
            if moved.rowcount == 0:
                self._taken = True
                return
            self._alive_at = asked_at

    def close(self) -> None:
        """Stop the heartbeat and release the lease if it is still held; ignore database errors."""
        self._end.set()
        self._thread.join(timeout=BEAT_SECONDS)
        mine = (_TABLE.c.study == self._study) & (_TABLE.c.token == self._token)
        with contextlib.suppress(sa.exc.SQLAlchemyError), self._engine.begin() as connection:
            connection.execute(_TABLE.delete().where(mine))


def make_engine(url: str) -> Engine:
    """Return an SQLAlchemy engine for the study's database, with the options of `engine_options`.

    Raises:
        UserError: the URL is invalid, or the database driver is not installed.
    """
    try:
        return sa.create_engine(url, **engine_options(url))
    except ModuleNotFoundError as error:
        raise UserError(
            f"NIPQ_STORAGE_URL: the package {error.name} is not installed; run python -m pip "
            "install 'nipq-search[postgres]' and write postgresql+psycopg://..."
        ) from error
    except (sa.exc.SQLAlchemyError, ValueError) as error:
        # For example, the port is not a number.
        raise UserError(
            f"NIPQ_STORAGE_URL: not a database URL ({type(error).__name__}); write "
            "postgresql+psycopg://USER:PASSWORD@HOST:PORT/NAME"
        ) from error


def _make_table(engine: Engine) -> None:
    """Create the table if it is missing; another driver may be creating it concurrently."""
    try:
        _TABLE.metadata.create_all(engine)
    except sa.exc.SQLAlchemyError:
        if not sa.inspect(engine).has_table(_TABLE.name):
            raise


def _row(engine: Engine, study: str) -> Any:
    with engine.connect() as connection:
        return connection.execute(_TABLE.select().where(_TABLE.c.study == study)).first()


def _insert(engine: Engine, row: dict[str, Any]) -> bool:
    """Insert the row of a study; return False if another driver has already inserted one."""
    try:
        with engine.begin() as connection:
            connection.execute(_TABLE.insert().values(**row))
    except sa.exc.IntegrityError:
        return False
    return True


def _swap(engine: Engine, old: Any, row: dict[str, Any]) -> bool:
    """Take a row over; return False if it has been renewed or taken since it was read."""
    same = (_TABLE.c.study == old.study) & (_TABLE.c.token == old.token)
    with engine.begin() as connection:
        taken = connection.execute(
            _TABLE.update().where(same & (_TABLE.c.beat == old.beat)).values(**row)
        )
    return bool(taken.rowcount)


def _machine() -> str:
    """Return an ID of this machine, boot and container, because host names are not unique."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return digest(" ".join([socket.gethostname(), *parts]).encode())[:12]


def _is_dead_here(row: Any) -> bool:
    """Return whether the row's driver ran on this machine and its process no longer exists."""
    if row.token.partition(".")[0] != _machine():
        return False
    try:
        os.kill(row.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _acquire(engine: Engine, study: str, token: str) -> None:
    """Acquire the lease; if another driver holds it, wait until it expires or is renewed.

    Raises:
        UserError: the driver that holds it is running; the message names its host and pid.
    """
    _make_table(engine)
    row = {"study": study, "token": token, "host": socket.gethostname()[:255], "pid": os.getpid()}
    row["beat"] = 0
    watched, since, warned = None, _now(), False
    while True:
        found = _row(engine, study)
        if found is None:
            if _insert(engine, row):
                return
            continue
        if watched is None:
            watched, since = found, _now()
        if (found.token, found.beat) != (watched.token, watched.beat):
            raise UserError(
                f"a driver is running the sweep '{study}' on host {found.host}, pid {found.pid}; "
                "wait for it to finish, or run `nipq-search stop` there"
            )
        if _now() - since > EXPIRY_SECONDS or _is_dead_here(found):
            if _swap(engine, found, row):
                return
            watched = None
            continue
        if not warned:
            _log.warning(
                "the sweep's lease belongs to the driver on host %s, pid %d, which is running or "
                "was killed: watching its heartbeat for up to %.0f s",
                found.host,
                found.pid,
                EXPIRY_SECONDS,
            )
            warned = True
        time.sleep(min(1.0, BEAT_SECONDS / 5))


def _no_check() -> None:
    """Permit every write: a study stored as a file is protected by the lock of its folder."""


@contextlib.contextmanager
def study_lease(study: str, token: str) -> Iterator[Callable[[], None]]:
    """Hold the lease of a study for this process if the study has a URL; see `storage_url`.

    Args:
        study: name of the study.
        token: token of this driver's run.

    Yields:
        A function that raises `LeaseLost` once this process must stop writing.

    Raises:
        UserError: another driver holds the lease, the URL is invalid, or the server is
            unreachable; the message contains no password.
    """
    url = storage_url()
    if url is None:
        yield _no_check
        return
    engine, token = make_engine(url), f"{_machine()}.{token}"
    try:
        try:
            _acquire(engine, study, token)
        except (sa.exc.SQLAlchemyError, OSError) as error:
            raise UserError(
                f"NIPQ_STORAGE_URL: the study's storage is unreachable ({type(error).__name__}); "
                "check the scheme, host, user and password, and that the server is running"
            ) from error
        lease = StorageLease(engine, study, token)
        lease.start()
        try:
            yield lease.check
        finally:
            lease.close()
    finally:
        engine.dispose()
