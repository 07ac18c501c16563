"""Cleanup of the processes of a local Ray cluster after its driver has ended.

Ray's processes exit when their driver is killed, but some agents first wait up to a minute for a
server that died with the driver. A small helper process therefore waits on a pipe for the driver
to end and then kills the remaining processes of the cluster. To find them, it tracks the process
tree below the daemons that the driver started. On systems without `/proc`, no helper is started.
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
"""A process ID and its start time, which together are unique even if the ID is reused."""


def process_tree() -> dict[int, tuple[int, str]]:
    """Return the parent's ID and the start time of every running process, by process ID.

    Zombies are excluded. On systems without `/proc`, the result is empty.
    """
    found = {}
    for folder in _PROC.iterdir() if _PROC.is_dir() else ():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError):
            # The process name in parentheses may contain spaces, so split after it.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] not in ("Z", "X"):
                found[int(folder.name)] = (int(fields[1]), fields[19])
    return found


def descendants(roots: set[int], tree: dict[int, tuple[int, str]]) -> set[Process]:
    """Return the running processes among `roots`, together with all their descendants.

    Args:
        roots: process IDs.
        tree: result of `process_tree`.
    """
    members, grown = set(roots) & tree.keys(), True
    while grown:
        below = {pid for pid, (parent, _) in tree.items() if parent in members} - members
        members |= below
        grown = bool(below)
    return {(pid, tree[pid][1]) for pid in members}


def children_now() -> set[int]:
    """Return the IDs of the children of the current process."""
    own = os.getpid()
    return {pid for pid, (parent, _) in process_tree().items() if parent == own}


def _is_ray(pid: int) -> bool:
    """Return whether a process runs a server or a Python daemon of the Ray package (Ray 2.60)."""
    try:
        command = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
    return (
        b"/ray/core/" in command or b"/ray/_private/" in command or b"/ray/dashboard/" in command
    )


def ray_children(driver: int, others: set[int]) -> set[int]:
    """Return the IDs of the Ray processes that `driver` started itself, without `others`."""
    tree = process_tree().items()
    own = {pid for pid, (parent, _) in tree if parent == driver} - others
    return {pid for pid in own if _is_ray(pid)}


@contextlib.contextmanager
def reap_ray_processes() -> Iterator[None]:
    """Kill Ray processes started in this context that outlive it, or that outlive this process.

    On systems without `/proc`, do nothing.
    """
    if not _PROC.is_dir():
        yield
        return
    driver = os.getpid()
    others = {pid for pid, (parent, _) in process_tree().items() if parent == driver}
    command = [sys.executable, "-m", "nipq_search.search.backend.reaper", str(driver)]
    # The operating system closes the pipe when this process ends, even after SIGKILL.
    with subprocess.Popen([*command, *map(str, others)], stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _left(known: set[Process]) -> set[Process]:
    """Return the processes of `known` that are still running."""
    tree = process_tree()
    return {(pid, start) for pid, start in known if pid in tree and tree[pid][1] == start}


def watch(driver: int, others: set[int]) -> None:
    """Track Ray's processes below `driver` until standard input closes, then kill the survivors.

    Args:
        driver: ID of the process that starts Ray.
        others: IDs of the children that the driver had before it started Ray.
    """
    known: set[Process] = set()
    closed = False
    while not closed:
        closed = bool(select.select([sys.stdin], [], [], _TICK_SECONDS)[0]) and not os.read(0, 1)
        # Scan once more after the pipe has closed: daemons briefly outlive a killed driver.
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
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is sent to the whole process group
    watch(int(sys.argv[1]), {int(pid) for pid in sys.argv[2:]})
