"""Failing trials: the sweep continues and reports the cause."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_helpers import Command, Runs, attempts, states, trials, write_sweep

from nipq_search.train.loop import seed_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

MODULE = '''
"""A user-defined task in the working directory of the command."""
import os
import signal
import time

from nipq_search.tasks.vision.digits import Digits


class Moody(Digits):
    """Digits whose first epoch fails in some runs; `moods` maps its seed to the failure."""

    def __init__(self, *, moods=None, width=4):
        super().__init__(width=width)
        self.moods = moods or {}

    def loader(self, split, batch_size, seed=None):
        batches = super().loader(split, batch_size, seed)
        mood = self.moods.get(str(seed))
        if mood == "raise":
            raise ValueError("these digits are rotten")
        if mood == "nan":
            return [(images * float("nan"), labels) for images, labels in batches]
        if mood == "die":
            os._exit(1)
        if mood == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        while mood == "hang":
            time.sleep(1)
        return batches
'''
FLOAT, TRIAL = 2, 4
"""Salts of the seeds of the float model and of trials."""


def moody(folder: Path, moods: dict[tuple[int, int], str], **changes: object) -> Command:
    """Write a sweep of the task above, with moods by (trial number, salt)."""
    (folder / "my_module.py").write_text(MODULE)
    seeds = {
        str(seed_for(seed_for(0, number, salt), 0)): mood for (number, salt), mood in moods.items()
    }
    write_sweep(folder, task="my_module:Moody", task_args__moods=seeds, **changes)
    return Command(folder)


def test_failing_trials_are_recorded_and_the_others_finish(tmp_path: Path) -> None:
    moods = {1: "nan", 2: "raise", 3: "stop", 4: "hang", 5: "die"}
    command = moody(
        tmp_path,
        {(number, TRIAL): mood for number, mood in moods.items()},
        search__trials=7,
        limits__trial_minutes=0.1,
        limits__max_failures=2,
    )
    done = command.run(code=3)
    out = command.out
    assert states(out) == ["COMPLETE", *["FAIL"] * 5, "COMPLETE"]
    reasons = [trial.user_attrs.get("reason") for trial in trials(out)]
    assert reasons[0] is None and reasons[6] is None
    assert reasons[1] is not None and "the loss became nan" in reasons[1]
    assert reasons[2] == "ValueError: these digits are rotten"
    for number in (3, 4):
        assert reasons[number] == ("hung: killed after 0.1 minutes, twice (limits.trial_minutes)")
        assert len([a for a in attempts(out, number) if (a / "hang.txt").exists()]) == 2
    assert reasons[5] == "its process died 2 times (limits.max_failures)"
    assert "5 failed" in done.stderr
    statuses = ["FINISHED", *["FAILED"] * 5, "FINISHED"]
    runs = Runs(out)
    assert runs.parent == "FINISHED"
    assert runs.children == dict(enumerate(statuses))
    assert "these digits are rotten" in command("logs", "out", "2").stdout
    assert "in loader" in command("logs", "out", "4").stdout  # the stack in which it hung
    command.no_orphans()


def test_all_trials_failing_is_a_failure_that_says_why(tmp_path: Path) -> None:
    moods = {(number, TRIAL): "raise" for number in range(2)}
    command = moody(tmp_path, moods, search__trials=2)
    done = command.run(code=1)
    assert states(command.out) == ["FAIL", "FAIL"]
    assert "every trial failed; first reason: ValueError: these digits are rotten" in done.stderr


def test_a_float_model_that_fails_is_a_failure_that_says_why(tmp_path: Path) -> None:
    command = moody(tmp_path, {(0, FLOAT): "raise"})
    for _ in range(2):  # the second time without a cluster
        done = command.run(code=1)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert "the float model failed: ValueError: these digits are rotten" in errors[0]
        assert states(command.out) == []
        assert Runs(command.out).parent == "FAILED"
