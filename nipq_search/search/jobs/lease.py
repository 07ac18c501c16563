"""The lock that admits one driver at a time to a sweep's folder, and requests to stop that driver.

The operating system holds the lock (`flock`) and releases it when the process ends, so a crash
leaves nothing to clean up.
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

from nipq_search import file_io
from nipq_search.errors import UserError
from nipq_search.search.jobs.paths import LOCK_FILE, STOP_FILE


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Try to take the lock; return False if it is taken, or if its file has been deleted."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(descriptor).st_nlink > 0


def _take(descriptor: int) -> bool:
    """Try to take the lock for a driver, and return whether this succeeded.

    A failure is retried for a moment, because `live_driver` takes the lock briefly.
    """
    for _ in range(5):
        if _try_lock(descriptor):
            return True
        time.sleep(0.05)
    return False


def live_driver(folder: Path) -> dict[str, Any] | None:
    """Return a mapping with `host` and `pid` of the driver that is running this sweep, or None.

    If the driver has not written them, they are `unknown` and 0.
    """
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        # A shared lock, so that concurrent calls do not mistake each other for a driver.
        if _try_lock(descriptor, fcntl.LOCK_SH):
            return None
        return _owner(path)
    finally:
        os.close(descriptor)


def driver_host(folder: Path) -> str | None:
    """Return the host of the sweep's last driver, or None if it is unknown.

    Workers use this, because on some file systems the lock is not visible from other nodes.
    """
    owner = file_io.read_json(folder / LOCK_FILE)
    return str(owner["host"]) if isinstance(owner, dict) and "host" in owner else None


def _owner(path: Path) -> dict[str, Any]:
    """Return host and pid of the lock's holder, waiting briefly for a new driver to write them.

    If they are still missing after a second, return `unknown` and 0.
    """
    for _ in range(20):
        if isinstance(owner := file_io.read_json(path), dict):
            return owner
        time.sleep(0.05)
    return {"host": "unknown", "pid": 0}


def _already_running(folder: Path, owner: dict[str, Any]) -> UserError:
    """Return the error for a sweep that is being run by another driver."""
    return UserError(
        f"{folder}: a driver is running this sweep on host {owner['host']}, pid {owner['pid']}; "
        f"wait for it to finish, or stop it with `nipq-search stop {folder}`"
    )


def check_free(folder: Path) -> None:
    """Check, without writing anything, that no driver is running this sweep.

    Raises:
        UserError: a driver is running it; the message names its host and pid.
    """
    if (owner := live_driver(folder)) is not None:
        raise _already_running(folder, owner)


@contextlib.contextmanager
def driver_lease(folder: Path) -> Iterator[str]:
    """Lock the sweep's folder for this process, creating it if it is missing.

    Stop requests are discarded on entry and exit. If the folder contains only the lock on exit,
    the lock is removed, as are the folders that were created here.

    Yields:
        A token that is unique to this run.

    Raises:
        UserError: another driver holds the lock (the message names its host and pid), or the
            folder is not writable.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK_FILE
    descriptor = _open_lock(path)
    try:
        if not _take(descriptor):
            raise _already_running(folder, _owner(path))
        token = uuid.uuid4().hex
        # Write in place: replacing the file would leave the lock on the deleted one.
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": token}
        signature = json.dumps(owner).encode()
        with contextlib.suppress(OSError):  # `gc` must work on a full disk
            os.pwrite(descriptor, signature, 0)
            os.ftruncate(descriptor, len(signature))
        (folder / STOP_FILE).unlink(missing_ok=True)
        try:
            yield token
        finally:
            (folder / STOP_FILE).unlink(missing_ok=True)
            _remove_if_unused(path, created)
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """Open the lock file, creating the file and its folder if they are missing.

    Raises:
        UserError: the folder is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--out {path.parent}: not writable ({error.strerror})") from error


def _remove_if_unused(path: Path, created: list[Path]) -> None:
    """Remove the lock file from an otherwise empty folder, then the folders created for it."""
    if [entry.name for entry in path.parent.iterdir()] == [LOCK_FILE]:
        path.unlink()
        with contextlib.suppress(OSError):  # a folder is not empty
            for folder in created:
                folder.rmdir()


def request_stop(folder: Path) -> str | None:
    """Ask the running driver, if there is one, to stop gracefully; it reacts within a second.

    Returns:
        Host and pid of the driver, or None if no driver is running.
    """
    owner = live_driver(folder)
    if owner is None:
        return None
    file_io.write_bytes(folder / STOP_FILE, b"stop\n")
    return f"host {owner['host']}, pid {owner['pid']}"


def stop_requested(folder: Path) -> bool:
    """Return whether a stop was requested; workers on all nodes check the same file."""
    return (folder / STOP_FILE).exists()
