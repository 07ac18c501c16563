"""One driver at a time: the lock on a sweep's folder, and the request to stop.

The lock is the operating system's (`flock`): it goes with the process, so nothing has to be
cleaned up after a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nipq_search import storage
from nipq_search.errors import UserError
from nipq_search.search.jobs.paths import LOCK_FILE, STOP_FILE


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take the lock; False where somebody holds it, or removed its file after we opened it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(descriptor).st_nlink > 0


def _take(descriptor: int) -> bool:
    """Take the lock for a driver; an onlooker holds it for an instant only."""
    for _ in range(5):
        if _try_lock(descriptor):
            return True
        time.sleep(0.05)
    return False


def live_driver(folder: Path) -> dict[str, Any] | None:
    """`{"host": ..., "pid": ...}` of the driver that runs this sweep now, or None."""
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        # Shared: two onlookers do not take each other for a driver.
        if _try_lock(descriptor, fcntl.LOCK_SH):
            return None
        return _owner(path)
    finally:
        os.close(descriptor)


def driver_host(folder: Path) -> str | None:
    """The host of the sweep's last driver, for workers: not every node sees the lock itself."""
    owner = storage.read_json(folder / LOCK_FILE)
    return str(owner["host"]) if isinstance(owner, dict) and "host" in owner else None


def _owner(path: Path) -> dict[str, Any]:
    """Who holds the lock; a driver that has just taken it may not have signed yet."""
    for _ in range(20):
        if isinstance(owner := storage.read_json(path), dict):
            return owner
        time.sleep(0.05)
    return {"host": "unknown", "pid": 0}


def _taken(folder: Path, owner: dict[str, Any]) -> UserError:
    return UserError(
        f"{folder}: a driver is running this sweep on host {owner['host']}, pid {owner['pid']}; "
        f"wait for it, or end it with `nipq-search stop {folder}`"
    )


def check_free(folder: Path) -> None:
    """Check, without writing anything, that no driver runs this sweep now.

    Raises:
        UserError: one does; names host and pid.
    """
    if (owner := live_driver(folder)) is not None:
        raise _taken(folder, owner)


@contextlib.contextmanager
def driver_lease(folder: Path) -> Iterator[str]:
    """Hold the sweep for this process; yields a token that is new for every run.

    Raises:
        UserError: another driver holds it; names host and pid.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK_FILE
    descriptor = _open_lock(path)
    try:
        if not _take(descriptor):
            raise _taken(folder, _owner(path))
        token = uuid.uuid4().hex
        # Written in place: replacing the file would leave the lock on the old one.
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": token}
        signature = json.dumps(owner).encode()
        with contextlib.suppress(OSError):  # a full disk: `gc` is to make room
            os.pwrite(descriptor, signature, 0)
            os.ftruncate(descriptor, len(signature))
        (folder / STOP_FILE).unlink(missing_ok=True)
        try:
            yield token
        finally:
            (folder / STOP_FILE).unlink(missing_ok=True)
            _leave_nothing(path, created)
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """Open the lock file, made if missing.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--out {path.parent}: cannot be written ({error.strerror})") from error


def _leave_nothing(path: Path, created: list[Path]) -> None:
    """Remove a lock that guards an empty folder, and the folders that were made for it."""
    if [entry.name for entry in path.parent.iterdir()] == [LOCK_FILE]:
        path.unlink()
        with contextlib.suppress(OSError):  # somebody else put something there meanwhile
            for folder in created:
                folder.rmdir()


def request_stop(folder: Path) -> str | None:
    """Ask the live driver to stop gracefully; it sees the request within a second.

    Returns:
        Its host and pid, or None where no driver is live.
    """
    owner = live_driver(folder)
    if owner is None:
        return None
    storage.write_bytes(folder / STOP_FILE, b"stop\n")
    return f"host {owner['host']}, pid {owner['pid']}"


def stop_requested(folder: Path) -> bool:
    """Whether somebody asked this sweep to stop; workers on every node see the same file."""
    return (folder / STOP_FILE).exists()
