"""A sweep folder written by an earlier version can be read, and its sweep can be resumed.

`sweep-ba9aa43` was written by `write_folder.py` with the version of that commit. It has three
finished trials, one that failed, and one whose driver and worker were killed during training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sweep_helpers import Command, Runs, attempts, epochs, result, results, study
from write_folder import SWEEP, TASK

EARLIER = Path(__file__).with_name("sweep-ba9aa43")
EPOCHS = SWEEP["train"]["epochs"]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """The command line in a folder whose `out` is a copy of the earlier sweep."""
    shutil.copytree(EARLIER, tmp_path / "out")
    (tmp_path / "sweep.yaml").write_text(json.dumps(SWEEP))
    (tmp_path / "earlier_task.py").write_text(TASK)
    return Command(tmp_path)


def states(out: Path) -> list[str]:
    """Return the states of the trials, by number."""
    return [trial.state.name for trial in study(out, "earlier").get_trials()]


def test_it_is_read(command: Command) -> None:
    counts = command.document("status", "out")["states"]
    assert (counts["COMPLETE"], counts["FAIL"], counts["RUNNING"]) == (3, 1, 1)
    earlier = json.loads((EARLIER / "front.json").read_text())
    front = command.document("front", "out")
    assert [p["trial"] for p in front["points"]] == [p["trial"] for p in earlier["points"]]
    assert front["hypervolume"] == pytest.approx(earlier["hypervolume"])
    layers = command.document("show", "out", "0")["layers"]
    assert [layer["weight_bits"] for layer in layers] == [
        layer["weight_bits"] for layer in result(command.out, 0)["layers"]
    ]
    command("report", "out")
    assert (command.out / "report.html").stat().st_size > 1_000_000
    command("sync", "out")
    states = ["FINISHED"] * 3 + ["FAILED", "KILLED"]
    assert Runs(command.out).children == dict(enumerate(states))


def test_its_trials_are_replayed_within_a_tolerance(command: Command) -> None:
    """The records do not contain the versions with which they were computed."""
    document = command.document("replay", "out", "0")
    assert document["equal"] and document["provenance"]["recorded"] is None


@pytest.mark.cluster
def test_it_resumes(command: Command) -> None:
    before = results(command.out)
    done = command.run("--trials", "6", code=3)
    assert "1 failed" in done.stderr
    assert states(command.out) == ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] * 2
    assert before.items() <= results(command.out).items(), "finished jobs were left alone"
    first, second = (epochs(attempt) for attempt in attempts(command.out, 4))
    assert second[0] > 1, "the training continued from its checkpoint"
    assert sorted({*first, *second}) == list(range(1, EPOCHS + 1))
    children = Runs(command.out).children
    assert [children[number] for number in range(6)].count("FINISHED") == 5
