"""The other processes of a trial that trains on several GPUs, or in several processes on CPUs.

They are children of the trial's own process, on its node and within what the trial was given
there: one request for all of it, so that two trials never wait for each other's rest. (Ray Train
gives its workers a placement group of their own, apart from the trial's.) They talk over loopback,
and end with the trial's process, whatever ends it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
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

from nipq_search.blobs import StoreAway
from nipq_search.tasks import Task
from nipq_search.train import Hooks, Interrupted, Paused, TrainSpec, train
from nipq_search.train.parallel import ALONE, Team, joined
from nipq_search.train.spec import Released

_log = logging.getLogger("nipq_search")
_GRACE_SECONDS = 20.0
"""What the leader has to leave a training in which another process has ended."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a process is told: all that `train` needs, and where the others are.

    Attributes:
        task: its data loaded.
        spec: what to train.
        folder: the training's own.
        threads: of torch, in each process.
        gpu: whether each process has a GPU.
        store: file in which the processes find each other.
        size: processes.
        log: folder for what a process prints.
    """

    task: Task
    spec: TrainSpec
    folder: Path
    threads: int
    gpu: bool
    store: Path
    size: int
    log: Path

    @contextlib.contextmanager
    def as_member(self, rank: int) -> Iterator[Team]:
        """Be the process of this number."""
        import torch.distributed as dist

        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
        if self.gpu:
            torch.cuda.set_device(rank)
        store = dist.FileStore(str(self.store), self.size)  # type: ignore[attr-defined]
        with joined(store, rank, self.size) as team:
            yield team

    def reason_file(self, rank: int) -> Path:
        """Where a process that fails says why."""
        return self.log / f"reason-{rank}.txt"


class MemberFailed(RuntimeError):
    """Another process of the training raised an exception; its words are the message."""


class MemberKilled(RuntimeError):
    """Another process of the training ended without a word: killed, or out of memory."""


class _Members:
    """The processes that do not lead."""

    def __init__(self, part: Part) -> None:
        from ray import cloudpickle

        self.part = part
        self.failed: int | None = None
        self.over = threading.Event()
        self.processes: list[subprocess.Popen[bytes]] = []
        payload: bytes = cloudpickle.dumps(part)  # type: ignore[no-untyped-call]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        try:
            for rank in range(1, part.size):
                command = [sys.executable, "-m", "nipq_search.search.members", str(rank)]
                with (part.log / f"log-{rank}.txt").open("ab") as log:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=environment,
                    )
                self.processes.append(process)
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(len(payload).to_bytes(8, "little") + payload)
                    process.stdin.flush()  # and it stays open: its end is this process's end
            for rank, process in enumerate(self.processes, start=1):
                assert process.stdout is not None
                if not process.stdout.readline():
                    self.failed = rank
                    raise MemberFailed(self.reason())
        except BaseException:
            self.end()
            raise
        threading.Thread(target=self._watch, name="nipq-members", daemon=True).start()

    def _watch(self) -> None:
        """End this process if it does not notice that another one has ended."""
        while not self.over.wait(0.2):
            for rank, process in enumerate(self.processes, start=1):
                if process.poll():
                    self.failed = rank
                    self.kill()  # whose connections then tell the leader
                    if not self.over.wait(_GRACE_SECONDS):
                        _log.error("process %d ended", rank)
                        os._exit(1)
                    return

    def was_killed(self) -> bool:
        """Whether a process ended without an exception: killed, or out of memory."""
        if self.failed is None:
            return False
        self.processes[self.failed - 1].wait()
        return not self.part.reason_file(self.failed).exists()

    def reason(self) -> str:
        """What a failed process said."""
        assert self.failed is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.processes[self.failed - 1].wait(5)
        with contextlib.suppress(OSError):
            return f"process {self.failed}: {self.part.reason_file(self.failed).read_text()}"
        with contextlib.suppress(OSError):
            lines = (self.part.log / f"log-{self.failed}.txt").read_text().splitlines()
            return f"process {self.failed} did not start: {lines[-1][:300] if lines else ''}"
        return f"process {self.failed} did not start"

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def end(self) -> None:
        """Wait a little for processes that end by themselves, then kill what is left."""
        limit = time.monotonic() + 5
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, limit - time.monotonic()))
        self.over.set()
        self.kill()
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()


@contextlib.contextmanager
def leading(
    task: Task, spec: TrainSpec, folder: Path, *, size: int, threads: int, gpu: bool, log: Path
) -> Iterator[Team]:
    """Lead a training of `size` processes: the others call `train` with the same arguments.

    Raises:
        MemberFailed: one of them raised an exception.
        MemberKilled: one of them was killed; this process is to end as if it had been.
    """
    if size == 1:
        yield ALONE
        return
    with tempfile.TemporaryDirectory(prefix="nipq-members-") as place:
        part = Part(
            task=task,
            spec=spec,
            folder=folder,
            threads=threads,
            gpu=gpu,
            store=Path(place) / "store",
            size=size,
            log=log,
        )
        members = _Members(part)
        try:
            with part.as_member(0) as team:
                yield team
        except (Interrupted, Paused):
            raise
        except Exception as error:
            # The connection breaks before the end of the other process is seen.
            time.sleep(1)
            if members.failed is None:
                raise
            if members.was_killed():
                raise MemberKilled(f"process {members.failed} was killed") from error
            raise MemberFailed(members.reason()) from error
        finally:
            members.end()


def _ends_with_leader() -> None:
    """Wait for the end of the process that leads; runs in a thread."""
    sys.stdin.buffer.read()
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
        if isinstance(error, StoreAway):
            return 1  # not the training's fault: it has nothing to say
        reason = " ".join(str(error).split()) or type(error).__name__
        part.reason_file(rank).write_text(f"{type(error).__name__}: {reason}"[:500])
        return 1
    return 0


def _main() -> int:
    rank = int(sys.argv[1])
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    part: Any = pickle.loads(sys.stdin.buffer.read(size))
    threading.Thread(target=_ends_with_leader, daemon=True).start()
    print("ready", flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        return member(part, rank)


if __name__ == "__main__":
    # By its full name, as the leader's pickles have it.
    from nipq_search.search import members

    sys.exit(members._main())
