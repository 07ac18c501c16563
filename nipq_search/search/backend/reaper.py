"""Ends what a local Ray cluster leaves behind when its driver is gone.

Ray's own processes notice the end of a killed driver, but some of its agents wait up to a minute
for a server that died with it. A small process of ours waits for the driver's end on a pipe and
then kills whatever of that cluster is left. It knows the cluster by the process tree below the
daemons that the driver started. Where there is no `/proc`, Ray is left to itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_TICK_SECONDS = 1.0
_GRACE_SECONDS = 3.0

Process = tuple[int, str]
"""A process id with its start time, which tells it from a later process of the same id."""


def process_tree() -> dict[int, tuple[int, str]]:
    """Parent and start time of every living process."""
    found = {}
    for folder in _PROC.iterdir() if _PROC.is_dir() else ():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError):
            # The name in parentheses may hold anything, so count from its end.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] not in ("Z", "X"):
                found[int(folder.name)] = (int(fields[1]), fields[19])
    return found


def descendants(roots: set[int], tree: dict[int, tuple[int, str]]) -> set[Process]:
    """`roots` and everything below them, as far as they live."""
    members, grown = set(roots) & tree.keys(), True
    while grown:
        below = {pid for pid, (parent, _) in tree.items() if parent in members} - members
        members |= below
        grown = bool(below)
    return {(pid, tree[pid][1]) for pid in members}


def children_now() -> set[int]:
    """Children of this process."""
    own = os.getpid()
    return {pid for pid, (parent, _) in process_tree().items() if parent == own}


def _is_ray(pid: int) -> bool:
    """Whether a process runs something of Ray's package: its servers, its Python daemons."""
    try:
        command = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
    return (
        b"/ray/core/" in command or b"/ray/_private/" in command or b"/ray/dashboard/" in command
    )


def ray_children(driver: int, others: set[int]) -> set[int]:
    """Ray processes that `driver` itself started, apart from its `others`."""
    tree = process_tree().items()
    own = {pid for pid, (parent, _) in tree if parent == driver} - others
    return {pid for pid in own if _is_ray(pid)}


@contextlib.contextmanager
def reaped() -> Iterator[None]:
    """Have the Ray processes that this process starts within end with it, or at the exit."""
    if not _PROC.is_dir():
        yield
        return
    driver = os.getpid()
    others = {pid for pid, (parent, _) in process_tree().items() if parent == driver}
    command = [sys.executable, "-m", "nipq_search.search.backend.reaper", str(driver)]
    # The pipe closes with this process, however it ends.
    with subprocess.Popen([*command, *map(str, others)], stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _left(known: set[Process]) -> set[Process]:
    tree = process_tree()
    return {(pid, start) for pid, start in known if pid in tree and tree[pid][1] == start}


def watch(driver: int, others: set[int]) -> None:
    """Follow Ray's processes below `driver` until standard input closes, then end what is left.

    Args:
        driver: the process that starts Ray.
        others: children of it that are none of ours.
    """
    known: set[Process] = set()
    closed = False
    while not closed:
        closed = bool(select.select([sys.stdin], [], [], _TICK_SECONDS)[0]) and not os.read(0, 1)
        # Looked at once more after the end: daemons outlive a killed driver by an instant.
        roots = {pid for pid, _ in _left(known)} | ray_children(driver, others | {os.getpid()})
        known = descendants(roots, process_tree())
    end = time.monotonic() + _GRACE_SECONDS
    while (known := _left(known)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid, _ in known:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a Ctrl-C reaches the whole group
    watch(int(sys.argv[1]), {int(pid) for pid in sys.argv[2:]})
