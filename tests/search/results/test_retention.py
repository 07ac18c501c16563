"""`gc` deletes only files that the sweep no longer needs."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import optuna
import pytest
from unit_helpers import ledger_of, make_config, run_here

from nipq_search.cli import main
from nipq_search.errors import UserError
from nipq_search.records import TrialRecord
from nipq_search.search.commands.replay import replay
from nipq_search.search.jobs.lease import driver_lease
from nipq_search.search.results.progress import SilentProgress
from nipq_search.search.results.retention import collect, needed
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.study.ledger import Ledger


def record(number, metric, bops, **changes):
    plain = {
        field.name: None for field in dataclasses.fields(TrialRecord) if field.name != "trial"
    }
    state = {"state": "COMPLETE", "validation": metric, "cost": {"bops": bops, "weight_bytes": 9}}
    state |= {"on_front": False, "budget": {"bops": bops}, "params": {}}
    return TrialRecord(trial=number, **plain | state | changes)


def test_what_is_needed():
    records = [
        record(0, 0.90, 100.0),  # dominated, and not a parent
        record(1, 0.95, 100.0, on_front=True, parent=2),
        record(2, 0.94, 101.0),
        record(3, 0.10, 50.0, on_front=True),
        record(4, None, 500.0, state="RUNNING", cost={}, budget={"bops": 500.0}, parent=5),
        record(5, 0.20, 300.0),
        record(6, None, 70.0, state="FAIL", cost={}),
    ]
    independent = needed(records, make_config(search__strategy="independent"), "max")
    assert independent == {
        1: "on the front",
        3: "on the front",
        2: "parent of a trial on the front (1)",
        5: "parent of an open trial (4)",
    }
    alone = record(7, 0.05, 1000.0)
    warm = needed([*records, alone], make_config(search__strategy="ladder"), "max")
    assert warm.keys() == {1, 2, 3, 5, 7} and "further trial" in warm[7]
    least = needed(
        [record(0, 0.5, 100.0), record(1, 0.4, 100.0)],
        make_config(search__strategy="ladder"),
        "min",
    )
    assert least.keys() == {1}, "lower is better"


def sizes(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_only_unneeded_files_are_deleted_and_the_sweep_continues(sweep_copy, capsys):
    for left in ("trials/0/checkpoints/9", "trials/1/checkpoints/7"):  # left over after a kill
        (sweep_copy / left).mkdir(parents=True)
        (sweep_copy / left / "state.pt").write_bytes(b"x" * 1000)
    # Two dominated trials at the costs of other trials; neither is a parent.
    ledger = ledger_of(sweep_copy, make_config(search__strategy="fill", search__trials=5))
    for _ in range(2):
        first, asked = ledger.trials()[0], ledger.ask(0, 2)
        costs = {k: v for k, v in first.user_attrs.items() if k.startswith(("cost_", "budget"))}
        ledger.complete(asked.number, (0.01, first.values[1]), costs, 0.0)
        shutil.copytree(sweep_copy / "trials/0", sweep_copy / f"trials/{asked.number}")
    before = sizes(sweep_copy)
    assert main(["gc", str(sweep_copy), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sizes(sweep_copy) == before and told["dry_run"]
    assert main(["gc", str(sweep_copy), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["freed"] == told["freed"] and done["bytes"] == told["bytes"] > 20_000
    gone = before - sizes(sweep_copy)
    freed = {entry["path"] for entry in done["freed"]}
    assert all(any(file == path or file.startswith(path + "/") for path in freed) for file in gone)
    assert {
        "trials/0/checkpoints",
        "trials/5/attempt-1/model.pt",
        "trials/6/attempt-1/model.pt",
    } <= freed
    assert main(["gc", str(sweep_copy)]) == 0
    assert "0 bytes freed" in capsys.readouterr().out

    sweep = Sweep.open(sweep_copy)
    kept = {entry["trial"] for entry in done["kept"]}
    for trial in sweep.trials():
        assert (sweep.model_file(trial.trial) is not None) == (trial.trial in kept)
        if trial.on_front:
            sweep.load_model(trial.trial)
    assert replay(sweep, max(kept))["equal"]
    config = make_config(search__strategy="fill", search__trials=8)
    assert run_here(config, sweep_copy).complete == 8


def test_a_dry_run_writes_nothing(sweep_copy, capsys):
    lock = sweep_copy / "driver.lock"
    lock.write_text("as it was")
    assert main(["gc", str(sweep_copy), "--dry-run"]) == 0
    assert lock.read_text() == "as it was"
    with driver_lease(sweep_copy):
        assert main(["gc", str(sweep_copy), "--dry-run"]) == 2
    assert "a driver is running this sweep on host" in capsys.readouterr().err


def test_a_deleted_model_is_reported_and_is_never_a_parent(sweep_copy):
    sweep = Sweep.open(sweep_copy)
    for trial in sweep.trials():
        (sweep_copy / f"trials/{trial.trial}/attempt-1/model.pt").unlink()
    with pytest.raises(UserError, match="no trained model .deleted by `nipq-search gc`"):
        sweep.load_model(0)
    run_here(make_config(search__strategy="fill", search__trials=6), sweep_copy)
    assert Sweep.open(sweep_copy).trials()[5].parent is None


def test_models_that_best_returns_are_kept():
    """This includes models that are the best by a cost other than the front cost."""
    plain = {"bops": 100.0, "weight_bytes": 50.0}
    records = [
        record(0, 0.95, 100.0, on_front=True, cost=plain, budget={"bops": 100.0}),
        record(1, 0.94, 0, cost={**plain, "weight_bytes": 40.0}, budget={"weight_bytes": 40.0}),
        record(2, 0.93, 0, cost={**plain, "weight_bytes": 40.0}, budget={"weight_bytes": 40.0}),
        record(3, 0.92, 0, cost={"bops": 99.0, "weight_bytes": 45.0}, budget={"bops": 99.0}),
        record(4, 0.91, 0, cost={"bops": 99.0, "weight_bytes": 40.0}, budget={"bops": 99.0}),
    ]
    both = [{"bops": 99.5, "weight_bytes": 41.0}]
    kept = needed(records, make_config(search__strategy="independent"), "max", both)
    assert kept == {
        0: "on the front",
        1: "the best for a limit on weight_bytes",
        3: "the best for a limit on bops",
        4: "the best within a budget",
    }


def test_best_and_show_explain_a_missing_model(sweep_copy, caplog):
    (sweep_copy / "trials/0/attempt-1/model.pt").unlink()
    assert main(["show", str(sweep_copy), "0"]) == 0
    assert "trial 0: no trained model (deleted by `nipq-search gc`)" in caplog.text
    shutil.rmtree(sweep_copy / "trials")
    assert main(["best", str(sweep_copy), "--max", "bops=1e9"]) == 0
    assert "no trained model (its record is missing; restore" in caplog.text


def test_a_running_sweep_is_rejected(sweep_copy):
    with driver_lease(sweep_copy), pytest.raises(UserError, match="a driver is running"):
        collect(sweep_copy)


COSTS = {"cost_bops": 3e5, "cost_weight_bytes": 700.0}
WORDS = {"cost_bops": "cheap", "budget_bops": "x", "samples": "many", "seconds": "some"}
ADDED = {
    "values": {"values": [0.999, 1.0]},
    "one cost": {"values": [0.999, 3e5], "user_attrs": {"cost_bops": 3e5}},
    "all costs": {"values": [0.999, 3e5], "user_attrs": COSTS},
    "no figures": {"values": [math.inf, 0.0], "user_attrs": {"cost_bops": 0.0}},
    "words": {"values": [0.999, 1.0], "user_attrs": WORDS},
    "another budget": {
        "values": [0.999, 1.0],
        "params": {"budget": "a"},
        "distributions": {"budget": optuna.distributions.CategoricalDistribution(["a"])},
    },
}


@pytest.fixture
def added_to(sweep_copy):
    """A sweep to whose study trials were added with Optuna, and its front before that."""
    before = Sweep.open(sweep_copy).front_document()
    ledger = ledger_of(sweep_copy, make_config(search__strategy="fill"))
    for trial in ADDED.values():
        ledger.study.add_trial(optuna.trial.create_trial(**trial))
    ledger.close()
    return sweep_copy, before


def test_foreign_trials_have_no_model_and_change_nothing(added_to, capsys):
    out, before = added_to
    now = Sweep.open(out).front_document()
    assert (now["points"], now["hypervolume"]) == (before["points"], before["hypervolume"])
    for limit in ("bops=1e12", "weight_bytes=1", "weight_bytes=1e12"):
        assert main(["best", str(out), "--max", limit]) in (0, 1)
    for command in (["gc", str(out), "--dry-run"], ["status", str(out)], ["front", str(out)]):
        assert main(command) == 0
    assert "KeyError" not in capsys.readouterr().err
    run_here(make_config(search__strategy="fill", search__trials=13), out)
    done = Sweep.open(out).front_document()
    assert sorted(point["trial"] for point in done["points"]) == [0, 1, 2, 3, 4, 11, 12]
    assert done["test_hypervolume"] is not None
    assert main(["replay", str(out), "5"]) == 2
    assert "its record is missing" in capsys.readouterr().err


def test_a_foreign_trial_that_dominates_all_others_is_not_on_the_front(sweep_copy):
    """Otherwise, the trials that it dominates would not be evaluated on the test split."""
    before = make_config(search__strategy="fill")
    ledger = ledger_of(sweep_copy, before)
    ledger.study.add_trial(optuna.trial.create_trial(values=[1.0, 1.0]))
    ledger.close()
    # Trials under a smaller budget are on the front, as no other trial has so small a cost.
    budgets = [*before.as_json()["budgets"], {"bops": "uniform 2.1"}]
    run_here(make_config(search__strategy="fill", search__trials=9, budgets=budgets), sweep_copy)
    document = Sweep(sweep_copy).front_document()
    assert 5 not in [point["trial"] for point in document["points"]]
    assert any(p["on_front"] for p in document["points"] if p["trial"] > 5)
    assert all(p["test"] is not None for p in document["points"] if p["on_front"])
    assert document["test_hypervolume"] is not None


def test_a_missing_record_is_reported(sweep_copy):
    messages = []

    class Recorder(SilentProgress):
        def message(self, text):
            messages.append(text)

    config = make_config(search__strategy="fill", search__trials=5)
    run_here(config, sweep_copy, progress=Recorder())
    assert not any("missing" in text for text in messages)
    shutil.rmtree(sweep_copy / "trials/1")
    (sweep_copy / "trials/2/attempt-1/result.json").write_text('{"garb')
    run_here(config, sweep_copy, progress=Recorder())
    warning = "records of finished trials (1, 2; 2 in total) are missing"
    assert sum(warning in text for text in messages) == 1


def test_another_study_of_the_same_name_is_rejected(sweep_copy, tmp_path, monkeypatch, capsys):
    """With such a study in the environment, `gc` would delete files that are still needed."""
    url = f"sqlite:///{tmp_path / 'other.db'}"
    monkeypatch.setenv("NIPQ_STORAGE_URL", url)
    config = make_config(search__strategy="fill", search__trials=1)
    run_here(config, tmp_path / "other")
    before = sizes(sweep_copy)
    for command in (["gc"], ["status"], ["front"], ["sync"], ["replay", "0"]):
        arguments = [command[0], str(sweep_copy), *command[1:]]
        assert main(arguments) == 2, arguments
        assert "holds trials of another study" in capsys.readouterr().err
    with pytest.raises(UserError, match="NIPQ_STORAGE_URL that the sweep began with"):
        run_here(config, sweep_copy)
    assert sizes(sweep_copy) == before
    monkeypatch.delenv("NIPQ_STORAGE_URL")
    assert main(["gc", str(sweep_copy), "--dry-run"]) == 0


@pytest.mark.parametrize("what", ["no study", "an empty one", "only a torn line"])
def test_a_missing_study_is_reported_and_nothing_is_overwritten(sweep_copy, what, capsys):
    journal = sweep_copy / "study.log"
    journal.unlink()
    if what != "no study":
        journal.write_text('{"op_co' if what == "only a torn line" else "")
    before = {path: path.read_bytes() for path in sweep_copy.rglob("*") if path.is_file()}
    for command in ("status", "front", "report", "gc", "sync", "best"):
        limit = ["--max", "bops=1e9"] if command == "best" else []
        assert main([command, str(sweep_copy), *limit]) == 2, command
        assert "is gone; restore study.log, or set NIPQ_STORAGE_URL" in capsys.readouterr().err
    with pytest.raises(UserError, match="is gone; restore study.log"):
        run_here(make_config(search__strategy="fill", search__trials=6), sweep_copy)
    after = {path: path.read_bytes() for path in sweep_copy.rglob("*") if path.is_file()}
    lock = sweep_copy / "driver.lock"
    assert {**after, lock: b""} == {**before, lock: b""}


def test_an_empty_study_adopts_no_trials(sweep_copy):
    """This holds even if no record of the study's identity is left."""
    (sweep_copy / "study.log").unlink()
    (sweep_copy / "facts.json").unlink()
    Ledger.open(sweep_copy, "unit", "max", space={}, sampler="random", seed=0).close()
    config = make_config(search__strategy="fill", search__trials=6)
    with pytest.raises(UserError, match="holds trials of another study"):
        run_here(config, sweep_copy)


def test_leftovers_of_float_and_baseline_runs_are_deleted(sweep_copy, capsys):
    left = [
        sweep_copy / f"{place}/checkpoints/9/state.pt" for place in ("float", "baselines/lsq-4")
    ]
    for file in left:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x" * 1000)
    spare = sweep_copy / "float/attempt-2/model.pt"
    shutil.copytree(sweep_copy / "float/attempt-1", spare.parent)
    (sweep_copy / "float/attempt-1/result.json").write_text("{}")
    assert main(["gc", str(sweep_copy)]) == 0
    assert "- " in capsys.readouterr().out
    assert not any(file.exists() for file in left) and spare.exists()
    assert not (sweep_copy / "float/attempt-1/model.pt").exists()
    assert replay(Sweep.open(sweep_copy), 0)["equal"]


def test_files_that_cannot_be_deleted_are_not_reported_as_freed(sweep_copy, monkeypatch, capsys):
    (sweep_copy / "trials/1/checkpoints/9").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    assert main(["gc", str(sweep_copy)]) == 1
    assert "checkpoints: could not be deleted" in capsys.readouterr().err


def test_foreign_files_in_attempts_are_ignored(sweep_copy, capsys):
    trial = sweep_copy / "trials/0"
    for name in ("attempt-x", "attempt-1.bak", "attempt-01"):
        shutil.copytree(trial / "attempt-1", trial / name)
    attempt = sweep_copy / "trials/1/attempt-1"
    with (attempt / "curve.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"epoch": "x", "step": 1, "phase": "", "timestamp": 0}\n')
        file.write(b'{"epoch":"9","step":1,"phase":"noise","timestamp":0,"metrics":{}}\n')
    (attempt / "progress.json").write_text("[1, 2]")
    (attempt / "started.json").write_text('{"time": "noon", "pid": null}')
    for command in ("status", "front", "report", "gc", "sync"):
        assert main([command, str(sweep_copy)]) == 0, capsys.readouterr().err
    config = make_config(search__strategy="fill", search__trials=6)
    assert run_here(config, sweep_copy).complete == 6


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("facts.json", lambda text: text.replace('"front_cost"', '"cost"')),
        ("sweep.yaml", lambda text: text.replace("search:", "search: []\nlimits_:")),
        ("sweep.yaml", lambda text: text.replace("baselines", "base_lines")),
        ("sweep.yaml", lambda text: "- a\n- b\n"),
    ],
)
def test_a_damaged_description_is_named(sweep_copy, file, damage, capsys):
    path = sweep_copy / file
    path.write_text(damage(path.read_text()))
    for command in ("status", "front", "report", "gc"):
        assert main([command, str(sweep_copy)]) == 2
        error = capsys.readouterr().err
        assert f"{file}: damaged; run the sweep again" in error and error.count("\n") == 1
