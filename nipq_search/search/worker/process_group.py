"""Training in several processes: the process group of one training run, on GPUs or CPU cores.

The job's own process is rank 0. It starts the other ranks as child processes on its node, within
the resources assigned to the job there. A single resource request covers the whole group, so two
jobs cannot deadlock because each has obtained half of its processes. (Ray Train instead requests
a separate placement group for its workers.) The ranks communicate over the loopback interface.
All other ranks end when rank 0 does, even if it is killed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nipq_search.errors import UserError
from nipq_search.search.worker import failures
from nipq_search.tasks import Task
from nipq_search.train import Hooks, Interrupted, Paused, TrainSpec, train
from nipq_search.train.parallel import ALONE, Team, joined
from nipq_search.train.spec import Released

_log = logging.getLogger("nipq_search")
_GRACE_SECONDS = 20.0
"""Time that rank 0 has to leave a training run in which another rank has exited."""
_CAUSE_SECONDS = 10.0
"""Time that rank 0 waits, after a connection error, for the failure of the rank that caused it."""
_CLEANUP_SECONDS = 5.0
"""Time that another rank waits, after a connection error, for rank 0's exit to become visible."""
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """Everything that a rank needs: the arguments of `train`, and how to join the group.

    Attributes:
        task: the task, with its data loaded.
        spec: the specification of the training run.
        folder: folder of the training run.
        threads: number of torch threads of each process.
        gpu: whether each process has a GPU of its own.
        rendezvous: folder through which the processes find each other.
        size: number of processes.
        log: folder for the output of the other ranks.
    """

    task: Task
    spec: TrainSpec
    folder: Path
    threads: int
    gpu: bool
    rendezvous: Path
    size: int
    log: Path

    @contextlib.contextmanager
    def join(self, rank: int) -> Iterator[Team]:
        """Join the process group as `rank`, and leave it when the context exits."""
        import torch.distributed as dist

        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
        store = dist.FileStore(str(self.rendezvous / "store"), self.size)  # type: ignore[attr-defined]
        with joined(store, rank, self.size) as team:
            yield team

    def error_file(self, rank: int) -> Path:
        """Return the file in which a failing rank records its error."""
        return self.rendezvous / f"reason-{rank}.json"


class RankFailed(RuntimeError):
    """Another rank raised an exception or did not start; the message quotes its error."""


class RankKilled(RuntimeError):
    """A signal killed another rank before that rank reported an exception.

    For example, the kernel killed it because the machine ran out of memory.
    """


def _save_spec(group: GroupSpec) -> None:
    """Write the spec for the other ranks, with arrays in files that they can map into memory."""
    from ray import cloudpickle

    buffers: list[pickle.PickleBuffer] = []
    data: bytes = cloudpickle.dumps(group, protocol=5, buffer_callback=buffers.append)  # type: ignore[no-untyped-call]
    place = group.rendezvous
    try:
        (place / "spec").write_bytes(data)
        for number, buffer in enumerate(buffers):
            (place / f"buffer-{number}").write_bytes(buffer.raw())
    except OSError as error:  # errors of `write` carry no file name
        raise OSError(error.errno, error.strerror, str(place)) from error


def _load_spec(rendezvous: Path) -> GroupSpec:
    """Read the spec that `_save_spec` wrote."""
    count = len(list(rendezvous.glob("buffer-*")))
    buffers: list[Any] = []
    for number in range(count):
        with (rendezvous / f"buffer-{number}").open("rb") as file:
            # Map copy-on-write: some arrays are modified, for example when they become tensors.
            is_empty = os.fstat(file.fileno()).st_size == 0
            buffers.append(
                b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            )
    group: GroupSpec = pickle.loads((rendezvous / "spec").read_bytes(), buffers=buffers)
    return group


class _OtherRanks:
    """The child processes of rank 0."""

    def __init__(self, group: GroupSpec) -> None:
        self.group = group
        self.ended: dict[int, int] = {}  # exit status of each failed process, by rank
        self.over = threading.Event()
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the processes and return once each has loaded the spec.

        Raises:
            RankFailed: a process did not start.
            RankKilled: a process was killed.
            OSError: the spec cannot be written, for example because shared memory is full.
        """
        rendezvous = self.group.rendezvous
        _save_spec(self.group)
        try:
            for rank in range(1, self.group.size):
                self.processes.append(self._launch(rank))
            for rank, process in enumerate(self.processes, start=1):
                assert process.stdout is not None
                if not process.stdout.readline():
                    self.ended = {rank: process.wait()}
                    self.raise_cause()
            # Every process has loaded the files. Files in shared memory occupy RAM, and nothing
            # would delete them if all processes were killed at once.
            for file in [rendezvous / "spec", *rendezvous.glob("buffer-*")]:
                file.unlink()
        except BaseException:
            self.end()
            raise
        threading.Thread(target=self._watch, name="nipq-ranks", daemon=True).start()

    def _launch(self, rank: int) -> subprocess.Popen[bytes]:
        module = "nipq_search.search.worker.process_group"
        with (self.group.log / f"log-{rank}.txt").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, str(self.group.rendezvous), str(rank)],
                stdin=subprocess.PIPE,  # stays open while this process is alive
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )

    def _poll(self) -> None:
        """Record the exit status of each rank that has failed."""
        for rank, process in enumerate(self.processes, start=1):
            if process.poll():
                self.ended.setdefault(rank, process.returncode)

    def _watch(self) -> None:
        """Kill all other ranks when one fails, which interrupts rank 0; end rank 0 if it hangs."""
        while not self.over.wait(0.2):
            self._poll()
            if self.ended:
                time.sleep(0.5)  # the rank at fault may end slightly after one that it affected
                self._poll()
                self.kill()  # their closed connections raise an error in rank 0
                if not self.over.wait(_GRACE_SECONDS):
                    _log.error("a process of this training run has ended: %s", self._errors())
                    # Rank 0 is stuck in a collective operation, which no exception can interrupt.
                    os._exit(1)
                return

    def _errors(self) -> dict[int, dict[str, Any] | None]:
        """Return the error that each failed rank reported, by rank; None if it reported none."""
        errors: dict[int, dict[str, Any] | None] = {}
        for rank in self.ended:
            try:
                errors[rank] = json.loads(self.group.error_file(rank).read_text())
            except (OSError, ValueError):
                errors[rank] = None
        return errors

    def raise_cause(self) -> None:
        """Raise the error that ended another rank, if any: the root cause rather than an effect.

        Raises:
            RankKilled: a rank was killed.
            OSError: a rank failed because of a fault of the machine.
            OutOfMemoryError: the GPU of a rank ran out of memory.
            RankFailed: a rank raised another exception or did not start.
        """
        errors = self._errors()
        for rank, status in self.ended.items():
            if status < 0 and errors[rank] is None:
                raise RankKilled(f"process {rank} was killed (signal {-status})")
        for rank in sorted(errors, key=lambda rank: bool((errors[rank] or {}).get("echo"))):
            error = errors[rank]
            if error is None:
                lines = (self.group.log / f"log-{rank}.txt").read_text().splitlines()
                last = lines[-1][:300] if lines else ""
                raise RankFailed(f"process {rank} did not start: {last}")
            if error["errno"] is not None:
                raise OSError(error["errno"], error["text"])
            if error["gpu_memory"]:
                raise torch.OutOfMemoryError(f"process {rank}: {error['text']}")
            raise RankFailed(f"process {rank}: {error['text']}")

    def wait_for_failure(self, seconds: float) -> None:
        """Wait until a rank has failed, for at most `seconds`."""
        limit = time.monotonic() + seconds
        while not self.ended and time.monotonic() < limit:
            self._poll()
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill all other ranks immediately."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def end(self) -> None:
        """Give the processes a few seconds to exit on their own, then kill the rest."""
        self.over.set()
        limit = time.monotonic() + 5
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, limit - time.monotonic()))
        self.kill()
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()


def _is_echo(error: BaseException) -> bool:
    """Return whether an error may merely reflect that another process is gone."""
    import torch.distributed as dist

    return type(error) is RuntimeError or isinstance(error, dist.DistError)


@contextlib.contextmanager
def launch_group(
    task: Task, spec: TrainSpec, folder: Path, *, size: int, threads: int, gpu: bool, log: Path
) -> Iterator[Team]:
    """Launch a process group with this process as rank 0.

    The other ranks call `train` with the same task, spec and folder; the caller does so for
    rank 0.

    Args:
        task: the task, with its data loaded.
        spec: the specification of the training run.
        folder: folder of the training run.
        size: number of processes; 1 starts no other process.
        threads: number of torch threads of each other process.
        gpu: whether each process uses a GPU of its own.
        log: folder for the output of the other ranks.

    Yields:
        This process's view of the group, to pass to `train`.

    Raises:
        UserError: `gpu` is set, but this machine has fewer GPUs than `size`.
        RankFailed: another rank raised an exception or did not start.
        RankKilled: another rank was killed; the caller must then end this process, too.
        OSError: another rank failed because of a fault of the machine.
        OutOfMemoryError: the GPU of another rank ran out of memory.
    """
    if size == 1:
        yield ALONE
        return
    if gpu and (available := torch.cuda.device_count()) < size:
        raise UserError(f"{size} processes need {size} GPUs; this machine has {available}")
    memory = str(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="nipq-members-", dir=memory) as place:
        group = GroupSpec(
            task=task,
            spec=spec,
            folder=folder,
            threads=threads,
            gpu=gpu,
            rendezvous=Path(place),
            size=size,
            log=log,
        )
        others = _OtherRanks(group)
        others.start()
        try:
            with group.join(0) as team:
                try:
                    yield team
                except (Interrupted, Paused):
                    raise
                except Exception as error:
                    # Do this before leaving the group: leaving it makes the other ranks fail.
                    if _is_echo(error):
                        others.wait_for_failure(_CAUSE_SECONDS)
                        others.raise_cause()
                    others.over.set()
                    others.kill()
                    raise
        finally:
            others.end()


# The other ranks


def _end_with_rank_0(rendezvous: Path) -> None:
    """Wait until rank 0 ends, then delete `rendezvous` and end this process; runs in a thread."""
    os.read(0, 1)
    shutil.rmtree(rendezvous, ignore_errors=True)
    os._exit(1)


def run_rank(group: GroupSpec, rank: int) -> int:
    """Train as a rank other than 0, record an error for rank 0, and return the exit status."""
    device = torch.device("cuda", rank) if group.gpu else torch.device("cpu")
    torch.set_num_threads(group.threads)
    try:
        with group.join(rank) as team:
            train(group.task, group.spec, group.folder, device, Hooks(), team)
    except (Released, Interrupted):
        return 0
    except Exception as error:
        traceback.print_exc()
        group.error_file(rank).write_text(json.dumps(_describe(error)))
        if _is_echo(error):
            # If rank 0 was killed, let `_end_with_rank_0` delete the folder first.
            time.sleep(_CLEANUP_SECONDS)
        return 1
    return 0


def _describe(error: Exception) -> dict[str, Any]:
    """Return what rank 0 needs in order to raise this rank's error itself."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    number = None
    if isinstance(error, OSError) and error.errno in failures.MACHINE_ERRNOS:
        number, text = error.errno, " ".join(str(error.strerror).split())
    return {
        "text": text[:500],
        "errno": number,
        "echo": _is_echo(error),
        "gpu_memory": failures.is_gpu_out_of_memory(error),
    }


def _main() -> int:
    rendezvous, rank = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with_rank_0, args=(rendezvous,), daemon=True).start()
    group = _load_spec(rendezvous)
    if group.gpu:
        torch.cuda.set_device(rank)
    print("ready", flush=True)
    os.dup2(2, 1)  # rank 0 reads no further output
    return run_rank(group, rank)


if __name__ == "__main__":
    # Import the module under its full name, under which rank 0 pickled its classes.
    from nipq_search.search.worker import process_group

    try:
        status = process_group._main()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the waiting thread would keep the interpreter from exiting
