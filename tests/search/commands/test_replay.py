"""Trials are replayed from their records and compared, bit by bit or within a tolerance."""

from __future__ import annotations

import json

import pytest
import torch
from optuna.trial import TrialState
from unit_helpers import ledger_of, make_config, run_here

from nipq_search import file_io
from nipq_search.cli import main
from nipq_search.errors import UserError
from nipq_search.search.commands.replay import replay
from nipq_search.search.results.sweep import Sweep
from nipq_search.version import __version__


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
    file_io.write_sealed(file, file_io.read_sealed(file) | changes)


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


def provenance_of(folder, trial):
    return file_io.read_sealed(folder / f"trials/{trial}/attempt-1/result.json")["provenance"]


def test_records_carry_the_versions_that_computed_them(finished):
    for record in finished.rglob("attempt-*/result.json"):
        assert json.loads(record.read_text())["provenance"] == {
            "nipq_search": __version__,
            "torch": torch.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "plugins": {},
        }
    document = replay(Sweep.open(finished), 0)
    assert document["exact"] and document["tolerance"] is None and document["weights_compared"]
    assert document["provenance"]["recorded"] == document["provenance"]["here"]


@pytest.mark.parametrize(
    ("recorded", "reason"),
    [
        ({"torch": "1.0"}, f"recorded with torch 1.0, here {torch.__version__}"),
        ({"plugins": {"quantizer.x": "fake 1"}}, "recorded with quantizer.x fake 1, here none"),
        (None, "recorded without version information"),
    ],
)
def test_other_versions_are_named_and_compared_within_a_tolerance(
    sweep_copy, capsys, recorded, reason
):
    known = provenance_of(sweep_copy, 0)
    metrics = file_io.read_sealed(sweep_copy / "trials/0/attempt-1/result.json")["metrics"]
    change(
        sweep_copy,
        0,
        provenance=None if recorded is None else known | recorded,
        model_sha256="0" * 64,  # the model file itself is unchanged
        metrics={name: value * 1.001 for name, value in metrics.items()},
    )
    assert main(["replay", str(sweep_copy), "0"]) == 0
    shown = capsys.readouterr()
    assert f"compared within a tolerance: {reason}" in shown.err
    assert "weights within 0.1 %, metrics within 1.0 %" in shown.out
    document = replay(Sweep.open(sweep_copy), 0)
    assert document["equal"] and not document["exact"] and document["weights_compared"]
    assert document["tolerance"] == {"weights": 1e-3, "metrics": 1e-2}


def test_differences_beyond_the_tolerance_are_named(sweep_copy):
    file = sweep_copy / "trials/0/attempt-1/model.pt"
    state = torch.load(file, weights_only=True)
    name = next(key for key in state["model"] if key.endswith("weight"))
    for factor, expected in (
        (1.0005, []),
        (1.1, ["model_sha256"]),
        (float("nan"), ["model_sha256"]),
    ):
        changed = {**state["model"], name: state["model"][name] * factor}
        torch.save({**state, "model": changed}, file)
        change(sweep_copy, 0, provenance=None, model_sha256="0" * 64)
        document = replay(Sweep.open(sweep_copy), 0)
        assert [entry["name"] for entry in document["differences"]] == expected
        if expected:
            assert document["differences"][0]["tensor"] == name
            assert document["differences"][0]["relative_error"] > 1e-3
    change(sweep_copy, 0, metrics={"accuracy": 2.0}, steps=99)
    names = [entry["name"] for entry in replay(Sweep.open(sweep_copy), 0)["differences"]]
    assert names == ["model_sha256", "metrics", "steps"]


def test_a_model_that_was_freed_is_not_compared(sweep_copy, capsys):
    change(sweep_copy, 0, provenance=None, model_sha256="0" * 64)
    (sweep_copy / "trials/0/attempt-1/model.pt").unlink()
    assert main(["replay", str(sweep_copy), "0"]) == 0
    assert "the recorded model was deleted" in capsys.readouterr().out
