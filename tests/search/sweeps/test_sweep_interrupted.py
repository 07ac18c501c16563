"""A sweep interrupted by Ctrl-C, `stop`, SIGTERM or dead workers resumes with the same result."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_helpers import (
    Command,
    Runs,
    attempts,
    ended,
    epochs,
    reach,
    result,
    states,
    wait_for,
    write_sweep,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
MODULE = '''
import time
from pathlib import Path

from nipq_search.tasks.vision.digits import Digits


class Held(Digits):
    """Digits that waits, in the attempt named in a file, once that attempt has two epochs."""

    def __init__(self, *, hold):
        super().__init__(width=4)
        self.hold = Path(hold)

    def evaluate(self, model, split):
        while self.is_held():
            time.sleep(0.02)
        return super().evaluate(model, split)

    def is_held(self):
        try:
            attempt = Path(self.hold.read_text())
            return (attempt / "curve.jsonl").read_text().count("\\n") >= 2
        except FileNotFoundError:
            return False
'''
TRIALS, EPOCHS = 3, 8
LONG: dict[str, Any] = {
    "search__trials": TRIALS,
    "train__epochs": EPOCHS,
    "resources__concurrent": 1,
}
POLL_SECONDS = 0.5
"""The longest interval in which a training process looks for a stop request."""


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, its IPv4-mapped IPv6 address and ::1, in the kernel's notation."""


def listening(pid: int) -> list[str]:
    """Return the local addresses on which a process listens, in the kernel's notation."""
    sockets = set()
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(link) if link.is_symlink() else ""
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    except OSError:  # the process has ended
        return []
    rows = []
    for file in ("tcp", "tcp6"):
        text = Path(f"/proc/net/{file}").read_text()
        rows += [line.split() for line in text.splitlines()[1:]]
    return [r[1].partition(":")[0] for r in rows if r[3] == "0A" and r[9] in sockets]


def held_sweep(folder: Path) -> Command:
    """Write a sweep with trials to interrupt; `folder/hold` has the path of the held attempt."""
    (folder / "my_module.py").write_text(MODULE)
    arguments = {"hold": str(folder / "hold")}
    write_sweep(folder, task="my_module:Held", task_args=arguments, **LONG)
    return Command(folder)


def models(out: Path) -> list[str]:
    """Return the digests of the trained models, by trial number."""
    records = [result(out, number) for number in range(TRIALS)]
    return [record["model_sha256"] for record in records if record is not None]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Digests of the models of an uninterrupted sweep."""
    command = held_sweep(tmp_path_factory.mktemp("undisturbed"))
    command.run()
    found = models(command.out)
    assert len(set(found)) == TRIALS
    return found


def test_a_sweep_that_is_interrupted_three_times_ends_with_the_same_models(
    tmp_path: Path, undisturbed: list[str]
) -> None:
    command, out, hold = held_sweep(tmp_path), tmp_path / "out", tmp_path / "hold"

    def interrupt(trial: int, attempt: int, how: Callable[[int], Any]) -> None:
        """Run until a trial is in the middle of an attempt, then interrupt the driver."""
        folder = out / "trials" / str(trial) / f"attempt-{attempt}"
        hold.write_text(str(folder))
        process = command.popen(*command.arguments())
        with ended(process):
            reach(process, lambda: len(epochs(folder)) >= 2, "2 epochs")
            asked = time.monotonic()
            how(process.pid)
            wait_for((out / "stop.request").exists, "a stop request")
            time.sleep(POLL_SECONDS)
            hold.unlink()
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert time.monotonic() - asked < 30
        assert "run the same command again to resume" in stderr
        assert (folder / "stopped.json").exists() and result(out, trial) is None
        assert states(out)[trial] == "RUNNING"
        runs = Runs(out)
        assert runs.parent == "KILLED"
        assert runs.children[trial] == "KILLED"
        assert "RUNNING" not in runs.children.values()

    # A terminal sends Ctrl-C to the whole process group.
    interrupt(0, 1, lambda pid: os.killpg(pid, signal.SIGINT))

    def stop(pid: int) -> None:
        # Meanwhile, no other driver may run the sweep.
        refused = command.run(code=2)
        owner = json.loads((out / "driver.lock").read_text())
        assert owner["pid"] == pid
        assert owner["host"] in refused.stderr and str(pid) in refused.stderr
        assert str(pid) in command("stop", "out").stderr

    interrupt(0, 2, stop)
    interrupt(1, 1, lambda pid: os.kill(pid, signal.SIGTERM))
    assert "nothing to stop" in command("stop", "out").stderr

    command.run()
    assert states(out) == ["COMPLETE"] * TRIALS
    assert [len(attempts(out, number)) for number in range(TRIALS)] == [3, 2, 1]
    for number in range(TRIALS):
        parts = [epochs(attempt) for attempt in attempts(out, number)]
        assert sum(parts, []) == list(range(1, EPOCHS + 1)), "an epoch was lost or repeated"
    runs = Runs(out)
    assert runs.parent == "FINISHED"
    assert runs.children == dict.fromkeys(range(TRIALS), "FINISHED")
    assert models(out) == undisturbed
    command.no_orphans()


def test_a_trial_whose_worker_is_killed_ends_with_the_same_model(
    tmp_path: Path, undisturbed: list[str]
) -> None:
    command, out, hold = held_sweep(tmp_path), tmp_path / "out", tmp_path / "hold"
    folder = out / "trials" / "1" / "attempt-1"
    hold.write_text(str(folder))
    process = command.popen(*command.arguments())
    with ended(process):
        reach(process, lambda: len(epochs(folder)) >= 2, "2 epochs")
        found = [address for pid in command.processes() for address in listening(pid)]
        assert len(found) > 4 and set(found) <= LOOPBACK, "Ray's processes listen on loopback only"
        os.kill(json.loads((folder / "started.json").read_text())["pid"], signal.SIGKILL)
        hold.unlink()
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert states(out) == ["COMPLETE"] * TRIALS
    assert [len(attempts(out, number)) for number in range(TRIALS)] == [1, 2, 1]
    first, second = (epochs(attempt) for attempt in attempts(out, 1))
    assert second[0] > 1 and {*first, *second} == set(range(1, EPOCHS + 1))
    assert models(out) == undisturbed
