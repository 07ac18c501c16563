"""The study's journal file after a crash: a torn last line, a lock that nobody holds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import BinaryIO

_ENTRY = b'{"op_code":'
_LOCK_SECONDS = 5


def mend_journal(path: Path) -> None:
    """Cut a last line that a crash tore, which would make every later record unreadable.

    Where somebody else, such as `optuna-dashboard`, has written behind the torn line, only the
    torn part goes. Call it only while holding the sweep's lease.
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
    """Where the line begins that ends at `end`, or would."""
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
    """Remove the journal's lock if the process that took it is gone.

    Optuna holds it for milliseconds and waits half a minute before it breaks one, or for ever
    where the lock points into a folder that was moved since. Call it only while holding the
    sweep's lease: nobody but the `optuna` command or its dashboard can write meanwhile.
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
