"""Repairs of the study's journal after a crash, which can leave an incomplete line or a lock."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import BinaryIO

_ENTRY = b'{"op_code":'
_LOCK_SECONDS = 5


def mend_journal(path: Path) -> None:
    """Remove an incomplete last line, which would make every later entry unreadable.

    If another program, such as `optuna-dashboard`, appended an entry to the incomplete line, only
    the incomplete part is removed. A missing journal is ignored. Call this only while holding the
    sweep's lease.
    """
    try:
        size = path.stat().st_size
    except OSError:
        return
    with path.open("r+b") as file:
        end = _after_newline(file, size)
        if end < size:
            file.truncate(end)
        start = _after_newline(file, end - 1)
        file.seek(start)
        last = file.read(end - start)
        entry = last[max(0, last.rfind(_ENTRY)) :]
        if len(entry) < len(last) and not _is_entry(last) and _is_entry(entry):
            file.seek(start)
            file.write(entry)
            file.truncate()


def _after_newline(file: BinaryIO, end: int) -> int:
    """Return the offset after the last newline before the offset `end`; 0 if there is none."""
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        position = file.read(end - start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


def _is_entry(line: bytes) -> bool:
    try:
        return "op_code" in json.loads(line)
    except (ValueError, TypeError):
        return False


def free_journal(path: Path) -> None:
    """Wait until the journal's lock is released, or remove it once it is evidently orphaned.

    Optuna holds the lock for milliseconds, so a lock older than `_LOCK_SECONDS` is orphaned.
    Optuna itself would wait half a minute before removing the lock, or forever if the lock is a
    link into a folder that has been moved. Call this only while holding the sweep's lease, so that
    the only other possible writers are the `optuna` command and its dashboard.
    """
    lock = path.with_name(path.name + ".lock")
    for _ in range(100):
        try:
            age = time.time() - lock.lstat().st_mtime
        except OSError:
            return
        if age > _LOCK_SECONDS or age < -_LOCK_SECONDS:
            lock.unlink(missing_ok=True)
            return
        time.sleep(0.1)
