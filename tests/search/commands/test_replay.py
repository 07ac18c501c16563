"""Trials are replayed from their records and compared bit by bit."""

from __future__ import annotations

import json

import pytest
from optuna.trial import TrialState
from unit_helpers import ledger_of, make_config, run_here

from nipq_search import storage
from nipq_search.cli import main
from nipq_search.errors import UserError
from nipq_search.search.commands.replay import replay
from nipq_search.search.results.sweep import Sweep


def test_every_replay_matches(finished):
    sweep, lines = Sweep.open(finished), []
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    records = sweep.trials()
    assert any(r.parent is not None for r in records) and any(r.parent is None for r in records)
    for record in records:
        document = replay(sweep, record.trial, lines.append)
        assert document["equal"], document["differences"]
    assert len(lines) == len(records)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_the_replay_of_a_trial_that_paused_at_rungs_matches(tmp_path):
    config = make_config(search__strategy="halving", search__baselines=[], search__trials=4)
    run_here(config, tmp_path / "sweep")
    ledger = ledger_of(tmp_path / "sweep", config)
    (number, *_) = [t.number for t in ledger.trials(TrialState.COMPLETE)]
    assert replay(Sweep.open(tmp_path / "sweep"), number)["equal"]


def change(folder, trial, **changes):
    file = folder / f"trials/{trial}/attempt-1/result.json"
    storage.write_sealed(file, storage.read_sealed(file) | changes)


def test_differences_are_listed_and_exit_4(sweep_copy, capsys):
    change(sweep_copy, 1, steps=99, model_sha256="0" * 64)
    assert main(["replay", str(sweep_copy), "1", "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in document["differences"]] == ["model_sha256", "steps"]
    assert main(["replay", str(sweep_copy), "1"]) == 4
    assert "the replay did not match the recorded trial" in capsys.readouterr().out


def test_seed_and_threads_come_from_the_record(sweep_copy):
    change(sweep_copy, 0, seed=1)
    assert not replay(Sweep.open(sweep_copy), 0)["equal"]


def test_trials_that_cannot_be_replayed_are_rejected(sweep_copy, capsys):
    with pytest.raises(UserError, match="no such trial"):
        replay(Sweep.open(sweep_copy), 77)
    child = next(r for r in Sweep.open(sweep_copy).trials() if r.parent is not None)
    (sweep_copy / f"trials/{child.parent}/attempt-1/model.pt").unlink()
    assert main(["replay", str(sweep_copy), str(child.trial)]) == 2
    assert "missing, but the trial started from this model" in capsys.readouterr().err
    change(sweep_copy, child.trial, state="FAIL")
    with pytest.raises(UserError, match="only COMPLETE trials can be replayed"):
        replay(Sweep.open(sweep_copy), child.trial)
