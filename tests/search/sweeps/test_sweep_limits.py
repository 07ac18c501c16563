"""Limits, and a user-defined task and storage."""

from __future__ import annotations

import warnings
from pathlib import Path

import optuna
import pytest
from sweep_helpers import Command, write_sweep

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

MODULE = '''
"""A task that records each time it reads its data."""
from nipq_search.tasks.vision.digits import Digits


class Noting(Digits):
    """Digits of width 4."""

    def __init__(self, *, notes):
        super().__init__(width=4)
        self.notes = notes

    def load_data(self):
        if self._splits is None:
            with open(self.notes, "a") as file:
                file.write("read\\n")
        super().load_data()
'''
TRIALS = 3


def test_limits_end_a_run_and_the_same_sweep_goes_on(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(MODULE)
    notes = tmp_path / "notes.txt"
    write_sweep(
        tmp_path,
        task="my_module:Noting",
        task_args={"notes": str(notes)},
        search__trials=TRIALS,
    )
    database = tmp_path / "elsewhere.db"
    command = Command(tmp_path, NIPQ_STORAGE_URL=f"sqlite:///{database}")

    def complete() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{database}")
        return sum(trial.state.name == "COMPLETE" for trial in study.get_trials())

    done = command.run("--set", "limits.hours=0.0001")
    assert "limits.hours (0.0001) reached with 3 trials remaining" in done.stderr
    assert "run the same command again to continue" in done.stderr
    assert complete() == 0

    # The limit suffices for the float model and is used up by the first trial.
    done = command.run("--set", "limits.samples=2000", "--set", "resources.concurrent=1")
    assert "limits.samples" in done.stderr
    assert complete() == 1

    command.run()
    assert complete() == TRIALS
    assert not (command.out / "study.log").exists()
    assert command.document("status", "out")["states"]["COMPLETE"] == TRIALS
    # The data are read once per run, regardless of the number of trials and workers.
    assert notes.read_text().splitlines() == ["read"] * 3
    command.no_orphans()
