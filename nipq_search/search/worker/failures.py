"""Why a job's process ended without a record, and whose fault that was.

A trial that always crashes is given up after `limits.max_failures`; a node that dies under it, as
spot machines do, must not count. Ray reports the end of a process; what it means is decided here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nipq_search.search import jobs
from nipq_search.search.jobs.lease import driver_host

NODE, MEMORY, GPU_MEMORY, PROCESS = jobs.NODE, "memory", "gpu memory", "process"

MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
"""Errors of the machine under a job: no job can run there until that is mended."""

_PLACE = {errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.ENFILE}
"""Errors of the machine if they are about a file of the sweep's own folder."""

NEVER_STARTED = "its process died before it could start"
"""Reason of a job that never began an attempt."""

HEARTBEATS_SECONDS = 30.0
"""Time within which Ray notices that a node is dead; by default some 15 seconds."""

FIXES = {
    MEMORY: "its machine ran out of memory; give trials more by resources.memory_gb, or make "
    "train.batch_size smaller",
    GPU_MEMORY: "its GPU ran out of memory; give trials more of it by resources.gpus, or make "
    "train.batch_size smaller (train.accumulate keeps the whole of it)",
}
"""What to do where a job was given up for a cause."""

_ELSEWHERE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOTCONN, errno.ENODEV}
"""Errors of files that are not there, or out of reach."""


_TOLD = re.compile(r"\[Errno (\d+)\] [^:\n]*(?:: '([^'\n]+)')?")

_NO_ROOM = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What libraries say where torch's own allocator was not asked."""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def os_error(error: BaseException) -> OSError | None:
    """The operating system's error that an error is or was raised from, if there is one.

    A `DataLoader` with workers raises theirs anew, from text: number and file are read from it.
    """
    found = next((e for e in _causes(error) if isinstance(e, OSError)), None)
    if found is not None and found.errno is None and (told := _TOLD.findall(str(found))):
        number, name = int(told[-1][0]), told[-1][1]
        return OSError(number, os.strerror(number), name or None)
    return found


def _file(error: OSError) -> Path | None:
    name = error.filename
    return Path(os.path.abspath(os.fsdecode(name))) if isinstance(name, (str, bytes)) else None


def is_the_machine(error: BaseException, out: Path) -> bool:
    """Whether an error says that no job of a sweep can run here: its disk, or its folder."""
    if (found := os_error(error)) is None:
        return False
    file = _file(found)
    own = file is not None and file.is_relative_to(out)
    return found.errno in MACHINE or (own and found.errno in _PLACE)


def is_missing_here(error: BaseException, out: Path) -> bool:
    """Whether a file that the driver's host has, such as data, is not to be read on this node.

    Files of the sweep are not meant. What the driver's host has not either is the trial's fault.
    """
    found, host = os_error(error), driver_host(out)
    if found is None or found.errno not in _ELSEWHERE or host in (None, socket.gethostname()):
        return False
    file = _file(found)
    return file is not None and not file.is_relative_to(out) and is_on(str(host), str(file))


def is_on(host: str, file: str) -> bool:
    """Whether a host of the cluster has a file; False if it does not answer."""
    if own_node() is None:
        return False
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeManagerHostname"] == host]  # type: ignore[no-untyped-call]
    if not nodes:
        return False
    there = NodeAffinitySchedulingStrategy(nodes[0]["NodeID"], soft=False)
    remote: Any = ray.remote(_exists)
    asked = remote.options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(file)
    try:
        return bool(ray.get(asked, timeout=HEARTBEATS_SECONDS))
    except ray.exceptions.RayError:
        return False


def _exists(file: str) -> bool:
    return os.path.exists(file)


def is_gpu_memory(error: BaseException) -> bool:
    """Whether a GPU had no room. A neighbour may have taken it: the job's next process may fit."""
    import torch

    return any(
        isinstance(cause, torch.OutOfMemoryError)
        or (isinstance(cause, RuntimeError) and any(word in str(cause) for word in _NO_ROOM))
        for cause in _causes(error)
    )


def is_no_job_s(error: BaseException, out: Path) -> bool:
    """Whether an error is the place's, by any of these, and no job's."""
    return is_the_machine(error, out) or is_missing_here(error, out) or is_gpu_memory(error)


def gpu_is_lost() -> bool:
    """Whether this process can use its GPU no more, as after a failed assertion in a kernel."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def own_node() -> str | None:
    """Ray's id of the node that this process runs on; None outside of Ray."""
    if "ray" not in sys.modules:
        return None
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else None


def dead_nodes() -> set[str]:
    """Ids of the cluster's nodes that are known to be dead; empty outside of Ray."""
    if own_node() is None:
        return set()
    import ray

    return {n["NodeID"] for n in ray.nodes() if not n["Alive"]}  # type: ignore[no-untyped-call]


def kill_on(node: str, pid: int) -> None:
    """End a process on another node of the cluster, one that is stopped as well."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    remote: Any = ray.remote(_kill)
    remote.options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def classify(error: BaseException | None, node_is_dead: bool) -> str:
    """The cause behind what Ray raised for a process that ended without an answer.

    Args:
        error: Ray's exception, if it is known.
        node_is_dead: whether the cluster says that the process's node is gone.
    """
    # By name: the kinds of several versions of Ray, and no import of it.
    kind = type(error).__name__
    preempted = bool(getattr(error, "preempted", False))
    if node_is_dead or preempted or kind == "NodeDiedError" or "node has died" in str(error):
        return NODE
    return MEMORY if kind == "OutOfMemoryError" else PROCESS


def judge(folder: Path, run: str, error: BaseException | None = None) -> str | None:
    """Note the causes of a job's attempts that ended without a word.

    An attempt that was taken for a crash is judged anew once its node turns out to be dead: the
    news of a process may come before that of its node.

    Args:
        folder: the job's.
        run: token of the driver's run; attempts of earlier runs died with their driver.
        error: what Ray raised for the last one.

    Returns:
        The cause of the last attempt; None where it did end, or never began.
    """
    silent = jobs.silent_attempts(folder, run)
    dead = dead_nodes() if silent else set()
    cause = None
    for attempt, started in silent:
        last = attempt == jobs.attempts(folder)[-1]
        known = jobs.cause_of(attempt)
        found = classify(error if last else None, started.get("node") in dead)
        cause = found if known is None or found == NODE else known
        if cause != known:
            jobs.note_cause(attempt, cause, str(error or ""))
        cause = cause if last else None
    return cause


def await_nodes(folder: Path, run: str) -> None:
    """Wait until it is known whether the nodes of recent silent attempts live.

    Ray tells of a lost connection at once, and of a dead node only after its heartbeats have been
    missing for some seconds. Meant for the moment before a job is given up.
    """
    own = own_node()
    if own is None:
        return
    while True:
        judge(folder, run)
        recent = [
            started
            for attempt, started in jobs.silent_attempts(folder, run)
            if started.get("node") not in (None, own)
            and jobs.cause_of(attempt) != NODE
            and time.time() - jobs.lost_at(attempt) < HEARTBEATS_SECONDS
        ]
        if not recent:
            return
        time.sleep(1)


def error_of(trial: Any) -> BaseException | None:
    """What Ray raised for a Tune trial that failed, if it can be read."""
    with contextlib.suppress(Exception):
        import pickle

        with open(trial.pickled_error_file, "rb") as file:
            found = pickle.load(file)
        return found if isinstance(found, BaseException) else None
    return None
