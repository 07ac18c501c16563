"""The other processes of a trial that trains on several GPUs, or in several processes on CPUs.

They are children of the trial's own process, on its node and within what the trial was given
there: one request for all of it, so that two trials never wait for each other's rest. (Ray Train
gives its workers a placement group of their own, apart from the trial's.) They talk over loopback,
and end with the trial's process, whatever ends it.
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
"""What the leader has to leave a training in which another process has ended."""
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a process is told: all that `train` needs, and where the others are.

    Attributes:
        task: its data loaded.
        spec: what to train.
        folder: the training's own.
        threads: of torch, in each process.
        gpu: whether each process has a GPU.
        place: folder in which the processes find each other.
        size: processes.
        log: folder for what a process prints.
    """

    task: Task
    spec: TrainSpec
    folder: Path
    threads: int
    gpu: bool
    place: Path
    size: int
    log: Path

    @contextlib.contextmanager
    def as_member(self, rank: int) -> Iterator[Team]:
        """Be the process of this number."""
        import torch.distributed as dist

        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
        store = dist.FileStore(str(self.place / "store"), self.size)  # type: ignore[attr-defined]
        with joined(store, rank, self.size) as team:
            yield team

    def reason_file(self, rank: int) -> Path:
        """Where a process that fails says why."""
        return self.place / f"reason-{rank}.json"


class MemberFailed(RuntimeError):
    """Another process of the training raised an exception; its words are the message."""


class MemberKilled(RuntimeError):
    """Another process of the training ended without a word: killed, or out of memory."""


def _store(part: Part) -> None:
    """Write a part for other processes; arrays so that these can look at them without a copy."""
    from ray import cloudpickle

    buffers: list[pickle.PickleBuffer] = []
    data: bytes = cloudpickle.dumps(part, protocol=5, buffer_callback=buffers.append)  # type: ignore[no-untyped-call]
    try:
        (part.place / "part").write_bytes(data)
        for number, buffer in enumerate(buffers):
            (part.place / f"buffer-{number}").write_bytes(buffer.raw())
    except OSError as error:  # a write names no file
        raise OSError(error.errno, error.strerror, str(part.place)) from error


def _fetch(place: Path) -> Part:
    """The part that `_store` wrote."""
    count = len(list(place.glob("buffer-*")))
    buffers: list[Any] = []
    for number in range(count):
        with (place / f"buffer-{number}").open("rb") as file:
            # Copy on write: some arrays are written to, as when they become tensors.
            empty = os.fstat(file.fileno()).st_size == 0
            seen = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            buffers.append(seen)
    part: Part = pickle.loads((place / "part").read_bytes(), buffers=buffers)
    return part


class _Members:
    """The processes that do not lead."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.ended: dict[int, int] = {}
        self.over = threading.Event()
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the processes and return once each has loaded its part.

        Raises:
            MemberFailed: one of them did not start.
            MemberKilled: one of them was killed.
            OSError: the shared memory is full.
        """
        part = self.part
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        _store(part)
        try:
            for rank in range(1, part.size):
                command = [sys.executable, "-m", "nipq_search.search.worker.process_group"]
                with (part.log / f"log-{rank}.txt").open("ab") as log:
                    process = subprocess.Popen(
                        [*command, str(part.place), str(rank)],
                        stdin=subprocess.PIPE,  # open as long as this process lives
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=environment,
                    )
                self.processes.append(process)
            for rank, process in enumerate(self.processes, start=1):
                assert process.stdout is not None
                if not process.stdout.readline():
                    self.ended = {rank: process.wait()}
                    self.explain()
            # Every process has them open. Nobody would remove them after a kill, and they are RAM.
            for file in [part.place / "part", *part.place.glob("buffer-*")]:
                file.unlink()
        except BaseException:
            self.end()
            raise
        threading.Thread(target=self._watch, name="nipq-members", daemon=True).start()

    def _look(self) -> None:
        """Note who has ended before its time."""
        for rank, process in enumerate(self.processes, start=1):
            if process.poll():
                self.ended.setdefault(rank, process.returncode)

    def _watch(self) -> None:
        """Have the leader notice that another process has ended."""
        while not self.over.wait(0.2):
            self._look()
            if self.ended:
                time.sleep(0.5)  # the cause may end a little after its first effect
                self._look()
                self.kill()  # whose connections then tell the leader
                if not self.over.wait(_GRACE_SECONDS):
                    _log.error("a process of this training has ended: %s", self._said())
                    os._exit(1)
                return

    def _said(self) -> dict[int, dict[str, Any] | None]:
        """What those that have ended said; None of one that said nothing."""
        said: dict[int, dict[str, Any] | None] = {}
        for rank in self.ended:
            try:
                said[rank] = json.loads(self.part.reason_file(rank).read_text())
            except (OSError, ValueError):
                said[rank] = None
        return said

    def explain(self) -> None:
        """Raise what ended other processes, if something did; the cause before its effects.

        Raises:
            MemberKilled: one ended without a word.
            OSError: the machine is unfit, one found.
            OutOfMemoryError: the GPU of one had no room.
            MemberFailed: one raised an exception.
        """
        said = self._said()
        for rank, status in self.ended.items():
            if status < 0 and said[rank] is None:
                raise MemberKilled(f"process {rank} was killed (signal {-status})")
        for rank in sorted(said, key=lambda rank: bool((said[rank] or {}).get("echo"))):
            reason = said[rank]
            if reason is None:
                lines = (self.part.log / f"log-{rank}.txt").read_text().splitlines()
                last = lines[-1][:300] if lines else ""
                raise MemberFailed(f"process {rank} did not start: {last}")
            if reason["errno"] is not None:
                raise OSError(reason["errno"], reason["text"])
            if reason["gpu_memory"]:
                raise torch.OutOfMemoryError(f"process {rank}: {reason['text']}")
            raise MemberFailed(f"process {rank}: {reason['text']}")

    def wait_for_end(self, seconds: float) -> None:
        """Wait until some process has ended before its time, but no longer."""
        limit = time.monotonic() + seconds
        while not self.ended and time.monotonic() < limit:
            self._look()
            time.sleep(0.1)

    def kill(self) -> None:
        """End all at once."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def end(self) -> None:
        """Wait a little for processes that end by themselves, then kill what is left."""
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
    """Whether an error says that another process has gone, rather than what is wrong."""
    import torch.distributed as dist

    return type(error) is RuntimeError or isinstance(error, dist.DistError)


@contextlib.contextmanager
def leading(
    task: Task, spec: TrainSpec, folder: Path, *, size: int, threads: int, gpu: bool, log: Path
) -> Iterator[Team]:
    """Lead a training of `size` processes: the others call `train` with the same arguments.

    Raises:
        UserError: there are fewer GPUs than processes.
        MemberFailed: one of them raised an exception.
        MemberKilled: one of them was killed; this process is to end as if it had been.
        OSError: one of them found the machine unfit.
    """
    if size == 1:
        yield ALONE
        return
    if gpu and torch.cuda.device_count() < size:
        here = torch.cuda.device_count()
        raise UserError(f"{size} processes need as many GPUs; {here} are here")
    memory = str(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="nipq-members-", dir=memory) as place:
        part = Part(
            task=task,
            spec=spec,
            folder=folder,
            threads=threads,
            gpu=gpu,
            place=Path(place),
            size=size,
            log=log,
        )
        members = _Members(part)
        members.start()
        try:
            with part.as_member(0) as team:
                try:
                    yield team
                except (Interrupted, Paused):
                    raise
                except Exception as error:
                    # Before this process leaves, which the others would take for a failure.
                    if _is_echo(error):
                        members.wait_for_end(3)
                        members.explain()
                    members.over.set()
                    members.kill()
                    raise
        finally:
            members.end()


def _ends_with_leader(place: Path) -> None:
    """Wait for the end of the process that leads, and tidy up after it; runs in a thread."""
    os.read(0, 1)
    shutil.rmtree(place, ignore_errors=True)
    os._exit(1)


def member(part: Part, rank: int) -> int:
    """Train as one of the processes that do not lead; the exit status."""
    device = torch.device("cuda", rank) if part.gpu else torch.device("cpu")
    torch.set_num_threads(part.threads)
    try:
        with part.as_member(rank) as team:
            train(part.task, part.spec, part.folder, device, Hooks(), team)
    except (Released, Interrupted):
        return 0
    except Exception as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        number = error.errno if isinstance(error, OSError) else None
        if number in failures.MACHINE:
            text = " ".join(str(error.strerror).split())  # type: ignore[attr-defined]
        else:
            number = None
        reason = {"text": text[:500], "errno": number, "echo": _is_echo(error)}
        reason["gpu_memory"] = failures.is_gpu_memory(error)
        part.reason_file(rank).write_text(json.dumps(reason))
        return 1
    return 0


def _main() -> int:
    place, rank = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_ends_with_leader, args=(place,), daemon=True).start()
    part = _fetch(place)
    if part.gpu:
        torch.cuda.set_device(rank)
    print("ready", flush=True)
    os.dup2(2, 1)  # nobody reads any more what is printed
    return member(part, rank)


if __name__ == "__main__":
    # By its full name, as the leader's pickles have it.
    from nipq_search.search.worker import process_group

    try:
        status = process_group._main()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the thread that waits would keep the interpreter from ending
