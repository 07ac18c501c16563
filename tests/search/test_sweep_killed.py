"""SIGKILL of the driver between deciding and recording: nothing is lost and nothing doubled."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from sweep_helpers import Command, Runs, attempts, ended, result, results, states, write_sweep

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

KILLER = '''
"""The command, but the n-th passage of a boundary kills the driver."""
import os
import signal
import sys

import optuna
from nipq_search.cli import main
from nipq_search.search.coordinator import Coordinator
from nipq_search.search.jobs import committed

boundary, left = sys.argv[1], int(sys.argv[2])
ask, tell, finished = optuna.Study.ask, optuna.Study.tell, Coordinator.finished


def passed(name):
    global left
    if name == boundary:
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)


def killing_ask(self, *args, **kwargs):
    trial = ask(self, *args, **kwargs)
    passed("ask")
    return trial


def killing_tell(self, *args, **kwargs):
    passed("attributes")
    trial = tell(self, *args, **kwargs)
    passed("tell")
    return trial


def killing_finished(self, job, *args, **kwargs):
    if job.kind == "trial" and committed(job.folder):
        passed("record")
    return finished(self, job, *args, **kwargs)


optuna.Study.ask, optuna.Study.tell, Coordinator.finished = (
    killing_ask, killing_tell, killing_finished
)
sys.exit(main(sys.argv[3:]))
'''
TRIALS = 7


def test_sigkill_at_the_four_boundaries_loses_and_doubles_nothing(tmp_path: Path) -> None:
    write_sweep(tmp_path, search__trials=TRIALS)
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    command, out = Command(tmp_path), tmp_path / "out"

    def killed(boundary: str, passage: int) -> dict[str, int]:
        process = command.popen(boundary, str(passage), *command.arguments(), script=script)
        with ended(process):
            _, stderr = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, stderr
        return results(out)

    def untold() -> list[int]:
        """Trials whose result is committed while the study still says RUNNING."""
        running = [n for n, state in enumerate(states(out)) if state == "RUNNING"]
        return [n for n in running if result(out, n) is not None]

    after_ask = killed("ask", 2)
    assert states(out) == ["RUNNING", "RUNNING"]
    assert not attempts(out, 1)

    after_record = killed("record", 1)
    assert after_ask.items() <= after_record.items()
    assert len(untold()) >= 1

    after_attributes = killed("attributes", 2)
    assert after_record.items() <= after_attributes.items()
    assert len(untold()) >= 1

    after_tell = killed("tell", 2)
    assert after_attributes.items() <= after_tell.items()
    assert states(out).count("COMPLETE") >= 3

    command.run()
    assert states(out) == ["COMPLETE"] * TRIALS
    assert after_tell.items() <= results(out).items()
    trial_results = [name for name in results(out) if name.startswith("trials/")]
    assert len(trial_results) == TRIALS
    for name in after_tell:  # what had its result was never started again
        if name.startswith("trials/"):
            number = int(name.split("/")[1])
            assert str(attempts(out, number)[-1].relative_to(out)) == str(Path(name).parent)
    runs = Runs(out)
    assert runs.parent == "FINISHED"
    assert runs.children == dict.fromkeys(range(TRIALS), "FINISHED")
    command.no_orphans()
