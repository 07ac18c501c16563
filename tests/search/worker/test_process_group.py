"""Training in several processes: in a sweep, with errors, and when processes are killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from unit_helpers import make_config, run_here

from nipq_search.blobs import StoreUnavailable
from nipq_search.search.backend.reaper import children_now, process_tree
from nipq_search.search.commands.replay import replay
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.worker import process_group
from nipq_search.search.worker.process_group import RankFailed, RankKilled, launch_group
from nipq_search.tasks.vision.digits import Digits
from nipq_search.train import FloatConfig, Hooks, Interrupted, TrainSpec, train

CPU = torch.device("cpu")


class Faulty(Digits):
    """A digits task whose loss raises, or kills its process, in all ranks except 0."""

    def __init__(self, error: Exception | None, everywhere: bool = False) -> None:
        super().__init__(width=4)
        self.load_data()
        self.error, self.everywhere, self.home = error, everywhere, os.getpid()

    def loss(self, model, batch):
        if os.getpid() != self.home or self.everywhere:
            if self.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise self.error
        return super().loss(model, batch)


class Unreadable(Digits):
    """A digits task that cannot be unpickled."""

    def __reduce__(self):
        return exec, ("raise RuntimeError('cannot be unpickled')",)


def together(task, folder, hooks=None, size=2):
    """Train a float model in `size` processes."""
    config = FloatConfig(epochs=1, batch_size=64)
    spec = TrainSpec(train=config.as_training(), seed=1)
    folder.mkdir(exist_ok=True)
    with launch_group(task, spec, folder, size=size, threads=1, gpu=False, log=folder) as team:
        return train(task, spec, folder, CPU, hooks or Hooks(), team)


@pytest.fixture(autouse=True)
def _no_child_is_left(warm):
    before = children_now()
    yield
    assert children_now() <= before


def test_a_sweep_in_two_processes_replays_bit_by_bit(tmp_path):
    """The float model, the baseline, the trials and the replay all train in two processes."""
    config = make_config(
        resources__workers=2, search__trials=2, search__baselines=[4], search__strategy="ladder"
    )
    run_here(config, tmp_path / "sweep")
    sweep = Sweep.open(tmp_path / "sweep")
    assert [r.state for r in sweep.trials()] == ["COMPLETE"] * 2
    child = next(r for r in sweep.trials() if r.parent is not None)
    assert replay(sweep, child.trial)["equal"]
    attempt = tmp_path / f"sweep/trials/{child.trial}/attempt-1"
    assert (attempt / "log-1.txt").exists()


def test_an_exception_in_another_rank_is_raised(tmp_path):
    with pytest.raises(RankFailed, match="process 1: ValueError: half of a batch is too little"):
        together(Faulty(ValueError("half of a batch\nis too little")), tmp_path)
    assert "Traceback" in (tmp_path / "log-1.txt").read_text()


def test_the_root_cause_is_raised_with_three_ranks(tmp_path):
    with pytest.raises(RankFailed, match="process [12]: ValueError: too little"):
        together(Faulty(ValueError("too little")), tmp_path, size=3)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_machine_fault_in_any_rank_is_raised_as_such(tmp_path, everywhere):
    """A full disk or an unreachable store is reported as such by every rank."""
    error = StoreUnavailable(errno.EIO, "s3://b/x: no answer")
    with pytest.raises(OSError, match="s3://b/x: no answer") as raised:
        together(Faulty(error, everywhere), tmp_path)
    assert raised.value.errno == errno.EIO


def test_gpu_out_of_memory_in_another_rank_is_raised_as_such(tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match="process 1: .*CUDA out of memory"):
        together(Faulty(torch.OutOfMemoryError("CUDA out of memory")), tmp_path)


def rendezvous_of(pid):
    """Return the rendezvous folder of rank 0, from the command line of rank 1."""
    (child,) = [child for child, (parent, _) in process_tree().items() if parent == pid]
    return Path(Path(f"/proc/{child}/cmdline").read_text().split("\0")[-3])


def test_killing_rank_0_leaves_no_shared_memory(tmp_path):
    """Otherwise the shared memory would fill up with every killed trial."""
    code = (
        "import sys, time, torch; from pathlib import Path; import test_process_group as t\n"
        "task = t.Digits(width=4); task.load_data()\n"
        "def wait(point): print('begun', flush=True); time.sleep(600)\n"
        "t.together(task, Path(sys.argv[1]), t.Hooks(on_epoch=wait))\n"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert leader.stdout is not None and leader.stdout.readline() == "begun\n"
    own = rendezvous_of(leader.pid)
    assert own.parent == Path("/dev/shm") and own.is_dir()
    assert not list(own.glob("buffer-*")), "deleted once every process has opened them"
    leader.kill()
    leader.wait()
    leader.stdout.close()
    limit = time.monotonic() + 20
    while own.exists():
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_a_killed_rank_is_recognized(tmp_path):
    with pytest.raises(RankKilled, match="process 1 was killed"):
        together(Faulty(None), tmp_path)


def test_a_rank_that_does_not_start_is_reported(tmp_path):
    with pytest.raises(RankFailed, match="did not start.*cannot be unpickled"):
        together(Unreadable(width=4), tmp_path)


def test_an_exception_in_rank_0_ends_the_others(tmp_path):
    def fails(point):
        raise OSError("the disk is full")

    task = Digits(width=4)
    task.load_data()
    with pytest.raises(OSError, match="the disk is full"):
        together(task, tmp_path, Hooks(on_epoch=fails))


def test_rank_0_may_continue_after_the_others_have_finished(tmp_path, monkeypatch, caplog):
    """The exit of the other ranks is not treated as a failure."""
    monkeypatch.setattr(process_group, "_GRACE_SECONDS", 0.5)

    class Slow(Digits):
        def evaluate(self, model, split):
            time.sleep(4)
            return super().evaluate(model, split)

    task = Slow(width=4)
    task.load_data()
    assert together(task, tmp_path).metrics["accuracy"] > 0
    assert not caplog.records
    assert (tmp_path / "log-1.txt").read_text() == ""


def test_a_stop_ends_all_ranks(tmp_path):
    task = Digits(width=4)
    task.load_data()
    threads = threading.active_count()
    with pytest.raises(Interrupted):
        together(task, tmp_path, Hooks(should_stop=lambda: True), size=3)
    result = together(task, tmp_path, size=3)
    assert result.steps > 1
    time.sleep(0.5)
    assert threading.active_count() <= threads
