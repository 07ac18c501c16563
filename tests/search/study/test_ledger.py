"""The ledger: decisions survive crashes and are never duplicated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from nipq_search.errors import UserError
from nipq_search.search.config.space import distribution
from nipq_search.search.study.journal import mend_journal
from nipq_search.search.study.ledger import BUDGET, Ledger
from nipq_search.search.study.proposals import RejectedTrial
from nipq_search.search.study.storage import JOURNAL, open_storage, storage_url

SPACE = {
    "lr": distribution("lr", {"log": [0.01, 0.1]}),
    "distill_weight": distribution("distill_weight", {"choice": [0, 0.5]}),
}


@pytest.fixture(params=["journal", "sqlite"])
def home(request, tmp_path, monkeypatch):
    """A folder whose study is a journal file or a database given by the environment."""
    monkeypatch.delenv("NIPQ_STORAGE_URL", raising=False)
    monkeypatch.delenv("NIPQ_STORAGE_URL_FILE", raising=False)
    if request.param == "sqlite":
        monkeypatch.setenv("NIPQ_STORAGE_URL", f"sqlite:///{tmp_path}/server.db")
    return tmp_path


def open_ledger(home, seed=1, sampler="random"):
    return Ledger.open(home, "sweep", "max", space=SPACE, sampler=sampler, seed=seed)


def finish(ledger, number, value=0.5, slack=-0.1):
    ledger.complete(number, (value, 10.0), {"samples": 5, "cost_bops": 10.0}, slack)


def states(ledger):
    return [trial.state for trial in ledger.trials()]


def test_life_cycle_of_a_trial(home):
    ledger = open_ledger(home)
    asked = ledger.ask(1, 2)
    assert (asked.number, asked.budget) == (0, 1)
    assert set(asked.params) == set(SPACE)
    ledger.note(0, {"seed": 7})
    finish(ledger, 0)
    trial = open_ledger(home).trials()[0]
    assert trial.state is TrialState.COMPLETE and trial.values == [0.5, 10.0]
    assert trial.params == {**asked.params, BUDGET: 1}
    assert trial.user_attrs == {
        "seed": 7,
        "samples": 5,
        "cost_bops": 10.0,
        "budget_slack": -0.1,
    }
    assert list(trial.constraints.values()) == [-0.1]


def test_finishing_twice_changes_nothing(home):
    ledger = open_ledger(home)
    for _ in range(2):
        ledger.ask(0, 2)
    finish(ledger, 0)
    ledger.fail(1, "it broke", {"samples": 3})
    before = [(t.state, t.values, t.user_attrs, t.datetime_complete) for t in ledger.trials()]
    for again in (ledger, open_ledger(home)):
        finish(again, 0, value=0.9)
        again.fail(0, "no", {})
        finish(again, 1)
        again.fail(1, "again", {"samples": 4})
    after = [(t.state, t.values, t.user_attrs, t.datetime_complete) for t in ledger.trials()]
    assert before == after
    assert ledger.trials()[1].user_attrs == {"reason": "it broke", "samples": 3}


def test_an_interrupted_tell_is_repeated(home, monkeypatch):
    """The driver crashes after it has stored the attributes and before `tell`."""
    ledger = open_ledger(home)
    ledger.ask(0, 2)

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "tell", crash)
        finish(ledger, 0)
    again = open_ledger(home)
    assert states(again) == [TrialState.RUNNING]
    finish(again, 0)
    assert states(again) == [TrialState.COMPLETE]


def test_a_running_trial_is_resumed_as_it_was(home):
    first = open_ledger(home).ask(1, 2)
    again = open_ledger(home)
    assert again.resume(0, 0, 2) == first
    assert again.resume(0, 0, 2) == first
    assert len(again.trials()) == 1


def test_a_trial_interrupted_during_ask_gets_the_missing_parameters(home):
    open_ledger(home).study.ask()  # a crash before any parameter was proposed
    asked = open_ledger(home).resume(0, 1, 2)
    assert asked.budget == 1 and set(asked.params) == set(SPACE)


def test_proposals_do_not_depend_on_where_the_search_was_interrupted(tmp_path):
    def search(folder, cuts):
        folder.mkdir()
        ledger, proposed = open_ledger(folder, sampler="tpe"), []
        for number in range(14):
            if number in cuts:
                ledger = open_ledger(folder, sampler="tpe")
            asked = ledger.ask(number % 2, 2)
            proposed.append(asked)
            finish(ledger, asked.number, asked.params["lr"])
        return proposed

    whole = search(tmp_path / "whole", ())
    assert search(tmp_path / "cut", (3, 4, 12)) == whole
    rates = [(asked.budget, asked.params["lr"]) for asked in whole]
    assert len(set(rates)) == len(rates), "no proposal is repeated for a budget"


def test_different_seeds_give_different_proposals(tmp_path):
    proposals = []
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        proposals.append(open_ledger(tmp_path / str(seed), seed=seed).ask(0, 2).params)
    assert proposals[0] != proposals[1]


@pytest.mark.parametrize(("wanted", "budget"), [({}, 1), ({BUDGET: 0}, 0)])
def test_enqueued_trials_are_used(home, wanted, budget):
    ledger = open_ledger(home)
    ledger.study.enqueue_trial({"lr": 0.02, **wanted})
    assert states(ledger) == [TrialState.WAITING]
    asked = ledger.ask(1, 2)
    assert (asked.number, asked.budget, asked.params["lr"]) == (0, budget, 0.02)
    assert len(ledger.trials()) == 1


def test_missing_parameters_of_enqueued_trials_are_proposed_separately(home):
    ledger = open_ledger(home)
    for _ in range(3):
        ledger.study.enqueue_trial({BUDGET: 0})
    rates = [ledger.ask(0, 2).params["lr"] for _ in range(4)]
    assert len(set(rates)) == 4


def test_an_attribute_that_is_null_is_stored(home):
    ledger = open_ledger(home)
    number = ledger.ask(0, 2).number
    ledger.note(number, {"parent": None})
    assert "parent" in ledger.trials()[number].user_attrs


def test_enqueued_trials_may_lie_outside_the_space(home):
    ledger = open_ledger(home)
    ledger.study.enqueue_trial({"lr": 0.5, "colour": "red", BUDGET: 7})
    with pytest.warns(UserWarning, match="out of range"):
        asked = ledger.ask(1, 2)
    assert asked.budget == 7 and asked.params["lr"] == 0.5
    assert "colour" not in asked.params


@pytest.mark.parametrize(
    "wanted", [{"lr": "fast"}, {"lr": -1.0}, {"lr": None}, {"distill_weight": 7}, {BUDGET: "x"}]
)
def test_unusable_enqueued_values_are_refused_with_the_trial_number(home, wanted):
    ledger = open_ledger(home)
    ledger.study.enqueue_trial(wanted)
    with pytest.raises(RejectedTrial) as caught:
        ledger.ask(0, 2)
    assert caught.value.number == 0 and next(iter(wanted)) in str(caught.value)
    with pytest.raises(RejectedTrial):
        open_ledger(home).resume(0, 0, 2)
    ledger.fail(0, str(caught.value), {})
    assert ledger.ask(0, 2).number == 1


def test_budgets_can_be_added(home):
    ledger = open_ledger(home)
    finish(ledger, ledger.ask(0, 1).number)
    again = open_ledger(home)
    assert again.ask(3, 4).budget == 3
    assert again.ask(0, 4).budget == 0


def test_remembered_values_survive(home):
    ledger = open_ledger(home)
    assert ledger.recall("config") is None
    ledger.remember("config", {"b": [1, None], "a": 2.5})
    assert open_ledger(home).recall("config") == {"a": 2.5, "b": [1, None]}
    ledger.name_metrics("accuracy", "bops")
    again = open_ledger(home)
    again.name_metrics("accuracy", "bops")
    assert again.study.metric_names == ["accuracy", "bops"]


def test_the_study_can_be_loaded_with_optuna(home):
    ledger = open_ledger(home)
    finish(ledger, ledger.ask(0, 2).number)
    study = optuna.load_study(study_name="sweep", storage=open_storage(home))
    assert [trial.number for trial in study.best_trials] == [0]
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]


@pytest.fixture
def journal(tmp_path, monkeypatch):
    monkeypatch.delenv("NIPQ_STORAGE_URL", raising=False)
    ledger = open_ledger(tmp_path)
    finish(ledger, ledger.ask(0, 2).number)
    return tmp_path / JOURNAL


@pytest.mark.parametrize("torn", ['{"op_code": 4, "tri', "{", "x" * 70_000])
def test_a_torn_last_line_is_removed(journal, torn):
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn.encode())
    mend_journal(journal)
    assert journal.read_bytes() == whole
    journal.write_bytes(whole + torn.encode())
    ledger = open_ledger(journal.parent)
    assert states(ledger) == [TrialState.COMPLETE]
    finish(ledger, ledger.ask(0, 2).number)
    assert states(open_ledger(journal.parent)) == [TrialState.COMPLETE] * 2


def test_complete_empty_and_missing_journals_are_unchanged(journal, tmp_path):
    whole = journal.read_bytes()
    mend_journal(journal)
    assert journal.read_bytes() == whole
    (tmp_path / "empty").touch()
    mend_journal(tmp_path / "empty")
    mend_journal(tmp_path / "none")
    assert (tmp_path / "empty").read_bytes() == b""
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("target", ["study.log", "/moved/away/study.log"])
def test_an_orphaned_lock_is_removed(target, tmp_path, monkeypatch):
    monkeypatch.delenv("NIPQ_STORAGE_URL", raising=False)
    open_ledger(tmp_path).ask(0, 2)
    lock = tmp_path / "study.log.lock"
    lock.symlink_to(target)
    long_ago = time.time() - 60
    os.utime(lock, (long_ago, long_ago), follow_symlinks=False)
    assert open_ledger(tmp_path).ask(0, 2).number == 1
    assert not lock.is_symlink()


@pytest.mark.parametrize("garbage", [b"garbage\n", b"[1]\n", b"\xff\xfe\x00\n"])
def test_the_error_for_a_damaged_journal_names_the_line(garbage, tmp_path, monkeypatch):
    monkeypatch.delenv("NIPQ_STORAGE_URL", raising=False)
    open_ledger(tmp_path).ask(0, 2)
    journal = tmp_path / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], garbage, *lines[2:]]))
    with pytest.raises(UserError, match="study.log: line [0-9]+ is damaged"):
        open_storage(tmp_path)


def test_the_storage_url_can_be_read_from_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("NIPQ_STORAGE_URL", raising=False)
    secret = tmp_path / "secret"
    secret.write_text(f"sqlite:///{tmp_path}/x.db\n")
    monkeypatch.setenv("NIPQ_STORAGE_URL_FILE", str(secret))
    assert storage_url() == f"sqlite:///{tmp_path}/x.db"
    open_ledger(tmp_path).ask(0, 2)
    assert (tmp_path / "x.db").exists() and not (tmp_path / JOURNAL).exists()
    monkeypatch.setenv("NIPQ_STORAGE_URL_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^NIPQ_STORAGE_URL_FILE: .*none: No such file"):
        storage_url()


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/x.db", "foo://u:pw@h/d"])
def test_an_unreachable_storage_gives_a_one_line_error_without_password(
    url, tmp_path, monkeypatch
):
    monkeypatch.setenv("NIPQ_STORAGE_URL", url)
    with pytest.raises(UserError, match=r"^NIPQ_STORAGE_URL: .*is unreachable") as caught:
        open_storage(tmp_path)
    assert "\n" not in str(caught.value) and "pw" not in str(caught.value)


def test_a_damaged_database_in_the_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("NIPQ_STORAGE_URL", raising=False)
    (tmp_path / "study.db").write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match=r"study\.db: .*cannot be opened \(\w+\); restore"):
        open_storage(tmp_path)


def test_a_database_in_the_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("NIPQ_STORAGE_URL", f"sqlite:///{tmp_path}/study.db")
    open_ledger(tmp_path).ask(0, 2)
    monkeypatch.delenv("NIPQ_STORAGE_URL")
    assert states(open_ledger(tmp_path)) == [TrialState.RUNNING]


def test_the_optuna_command_shows_the_journal(journal):
    command = [str(Path(sys.executable).parent / "optuna"), "--storage", str(journal), "trials"]
    found = subprocess.run(
        [*command, "--study-name", "sweep", "-f", "json"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)[0]["state"] == "COMPLETE"


def test_a_trial_enqueued_just_before_ask_keeps_its_values(home):
    ledger = open_ledger(home)
    finish(ledger, ledger.ask(1, 2).number)
    before = ledger.cached_trials()
    open_ledger(home).study.enqueue_trial({BUDGET: 0, "lr": 0.05})
    asked = ledger.ask(1, 2, before)
    assert (asked.budget, asked.params["lr"], asked.enqueued) == (0, 0.05, True)
    assert not ledger.ask(1, 2).enqueued


def test_a_write_invalidates_the_cached_trials(home):
    ledger = open_ledger(home)
    number = ledger.ask(1, 2).number
    before = ledger.cached_trials()
    assert ledger.cached_trials() is before
    finish(ledger, number)
    assert [t.state for t in ledger.cached_trials()] == [TrialState.COMPLETE]


def test_only_the_torn_part_of_a_line_is_removed(journal):
    """For example, `optuna-dashboard` may have appended an entry to a torn line."""
    whole = journal.read_bytes()
    entry = whole.splitlines(keepends=True)[-1]
    journal.write_bytes(whole + entry[: len(entry) // 2] + entry)
    mend_journal(journal)
    assert journal.read_bytes() == whole + entry
    journal.write_bytes(whole + b"garbage\n")
    mend_journal(journal)
    assert journal.read_bytes() == whole + b"garbage\n", (
        "garbage in a complete line needs a manual repair"
    )


def test_closing_the_ledger_removes_a_torn_line(journal):
    ledger = open_ledger(journal.parent)
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"op_code": 8, "wor')
    ledger.close()
    assert journal.read_bytes() == whole
