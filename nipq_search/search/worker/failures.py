"""Causes of failures of worker processes, and whether they count against the job.

A job is marked as failed after `limits.max_failures` crashes. The death of a node, which is common
with preemptible machines, must not count against the job. Ray only reports that a process ended;
this module determines the cause.
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
from nipq_search.search.jobs import Cause
from nipq_search.search.jobs.lease import driver_host

MACHINE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
"""Errors that are faults of the machine: no job can run on it until they are fixed."""

_FOLDER_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.EMFILE,
    errno.ENFILE,
}
"""Errors that are faults of the machine if they concern a file in the sweep's folder."""

_MISSING_ERRNOS = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ENODEV,
}
"""Errors that mean that a file does not exist or cannot be reached."""

NEVER_STARTED = "its process died before it could start"
"""Reason recorded for a job whose processes repeatedly died before they began an attempt."""

NODE_DEATH_SECONDS = 30.0
"""Time after which Ray has certainly detected a dead node; by default, it takes about 15 s."""

FIXES = {
    Cause.MEMORY: "its machine ran out of memory; raise resources.memory_gb, or lower "
    "train.batch_size",
    Cause.GPU_MEMORY: "its GPU ran out of memory; raise resources.gpus, or lower train.batch_size "
    "(raise train.accumulate to keep the effective batch size)",
}
"""What went wrong, and which settings of the sweep file to change, by cause."""

_OS_ERROR_TEXT = re.compile(r"\[Errno (\d+)\] [^:\n]*(?:: '([^'\n]+)')?")

_GPU_MEMORY_TEXTS = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Messages of allocation failures outside torch's own allocator."""


# Errors raised in this process


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then the errors that it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def find_os_error(error: BaseException) -> OSError | None:
    """Return the first `OSError` among an error and its causes, or None.

    A `DataLoader` re-raises an error of its workers with nothing but its text. In this case, the
    result is a new `OSError` with the errno and the file name that the text contains.
    """
    found = next((e for e in _causes(error) if isinstance(e, OSError)), None)
    if found is not None and found.errno is None:
        if matches := _OS_ERROR_TEXT.findall(str(found)):
            number, name = int(matches[-1][0]), matches[-1][1]
            return OSError(number, os.strerror(number), name or None)
    return found


def _path_of(error: OSError) -> Path | None:
    """Return the absolute path of the file that an error concerns, or None if it names no file."""
    name = error.filename
    return Path(os.path.abspath(os.fsdecode(name))) if isinstance(name, (str, bytes)) else None


def is_machine_fault(error: BaseException, out: Path) -> bool:
    """Return whether an error means that this machine can run no job of the sweep in `out`."""
    if (found := find_os_error(error)) is None:
        return False
    file = _path_of(found)
    in_sweep = file is not None and file.is_relative_to(out)
    return found.errno in MACHINE_ERRNOS or (in_sweep and found.errno in _FOLDER_ERRNOS)


def is_missing_only_here(error: BaseException, out: Path) -> bool:
    """Return whether an error concerns a file that exists on the driver's host but not here.

    Such a file may contain the task's data, for example. Files in the sweep's folder `out` are
    excluded. If the file is also missing on the driver's host, the job itself is at fault, and
    the result is False.
    """
    found, host = find_os_error(error), driver_host(out)
    if found is None or found.errno not in _MISSING_ERRNOS:
        return False
    if host in (None, socket.gethostname()):
        return False
    file = _path_of(found)
    if file is None or file.is_relative_to(out):
        return False
    return file_exists_on(str(host), str(file))


def is_gpu_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a GPU ran out of memory.

    Another process may have taken the memory, so the job may succeed in a new process.
    """
    import torch

    return any(
        isinstance(cause, torch.OutOfMemoryError)
        or (
            isinstance(cause, RuntimeError)
            and any(text in str(cause) for text in _GPU_MEMORY_TEXTS)
        )
        for cause in _causes(error)
    )


def is_environment_fault(error: BaseException, out: Path) -> bool:
    """Return whether the environment rather than the job is at fault for an error.

    This is the case for machine faults, files that are missing only on this node, and a lack of
    GPU memory.
    """
    return (
        is_machine_fault(error, out)
        or is_missing_only_here(error, out)
        or is_gpu_out_of_memory(error)
    )


def gpu_is_lost() -> bool:
    """Return whether this process can no longer use its GPU, as after a device-side assert."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# Nodes of the cluster


def own_node() -> str | None:
    """Return Ray's ID of the node that this process runs on; None outside Ray."""
    if "ray" not in sys.modules:
        return None
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else None


def dead_nodes() -> set[str]:
    """Return the IDs of the cluster's dead nodes; empty outside Ray."""
    if own_node() is None:
        return set()
    import ray

    return {n["NodeID"] for n in ray.nodes() if not n["Alive"]}  # type: ignore[no-untyped-call]


def file_exists_on(host: str, file: str) -> bool:
    """Return whether a file exists on a host of the cluster.

    The result is False outside Ray, and if the host is unreachable.
    """
    if own_node() is None:
        return False
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeManagerHostname"] == host]  # type: ignore[no-untyped-call]
    if not nodes:
        return False
    on_host = NodeAffinitySchedulingStrategy(nodes[0]["NodeID"], soft=False)
    remote: Any = ray.remote(_exists)
    task = remote.options(num_cpus=0, scheduling_strategy=on_host, max_retries=0).remote(file)
    try:
        return bool(ray.get(task, timeout=NODE_DEATH_SECONDS))
    except ray.exceptions.RayError:
        return False


def _exists(file: str) -> bool:
    return os.path.exists(file)


def kill_on(node: str, pid: int) -> None:
    """Kill a process on a node of the cluster, even if it is suspended; return immediately."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_node = NodeAffinitySchedulingStrategy(node, soft=False)
    remote: Any = ray.remote(_kill)
    remote.options(num_cpus=0, scheduling_strategy=on_node, max_retries=0).remote(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# Lost attempts


def classify(error: BaseException | None, node_is_dead: bool) -> Cause:
    """Return why a process was lost, judging by the error that Ray raised.

    Args:
        error: Ray's exception, or None if it is not known.
        node_is_dead: whether the cluster reports the process's node as dead.

    Returns:
        `Cause.NODE`, `Cause.MEMORY` or `Cause.PROCESS`.
    """
    # Compare names: they are the same in all versions of Ray, and Ray need not be imported.
    kind = type(error).__name__
    preempted = bool(getattr(error, "preempted", False))
    if node_is_dead or preempted or kind == "NodeDiedError" or "node has died" in str(error):
        return Cause.NODE
    return Cause.MEMORY if kind == "OutOfMemoryError" else Cause.PROCESS


def record_causes(folder: Path, run: str, error: BaseException | None = None) -> Cause | None:
    """Record the cause of each lost attempt of a job, unless it has been recorded already.

    If an attempt was recorded as a crash and its node is now reported dead, the recorded cause is
    replaced: the end of a process may be reported before that of its node.

    Args:
        folder: the job's folder.
        run: token of the driver's run; attempts of earlier runs are ignored, because they were
            killed with their driver.
        error: the exception that Ray raised for the last attempt, if known.

    Returns:
        Why the last attempt was lost; None if it was not lost, or if there is no attempt.
    """
    lost = jobs.lost_attempts(folder, run)
    dead = dead_nodes() if lost else set()
    cause = None
    for attempt, started in lost:
        is_last = attempt == jobs.attempts(folder)[-1]
        known = jobs.cause_of(attempt)
        found = classify(error if is_last else None, started.get("node") in dead)
        cause = found if known is None or found is Cause.NODE else known
        if cause != known:
            jobs.record_cause(attempt, cause, str(error or ""))
        cause = cause if is_last else None
    return cause


def await_node_states(folder: Path, run: str) -> None:
    """Record causes until it is certain whether the nodes of recently lost attempts are alive.

    Ray reports a lost connection immediately, but a dead node only after several missed
    heartbeats. Call this before marking a job as failed. Outside Ray, it does nothing.
    """
    own = own_node()
    if own is None:
        return
    while True:
        record_causes(folder, run)
        recent = [
            started
            for attempt, started in jobs.lost_attempts(folder, run)
            if started.get("node") not in (None, own)
            and jobs.cause_of(attempt) is not Cause.NODE
            and time.time() - jobs.loss_recorded_at(attempt) < NODE_DEATH_SECONDS
        ]
        if not recent:
            return
        time.sleep(1)


def tune_trial_error(trial: Any) -> BaseException | None:
    """Return the exception that Ray raised for a failed Tune trial; None if it cannot be read."""
    with contextlib.suppress(Exception):
        import pickle

        with open(trial.pickled_error_file, "rb") as file:
            found = pickle.load(file)
        return found if isinstance(found, BaseException) else None
    return None
