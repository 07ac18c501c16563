"""The order of jobs, and drivers that crash at any point without losing or repeating work."""

from __future__ import annotations

import shutil

import optuna
import pytest
import torch
from optuna.trial import TrialState
from unit_helpers import Bench, Crash, digits, make_config

from nipq_search.errors import UserError
from nipq_search.search import jobs
from nipq_search.search.coordinator.coordinator import Coordinator, Verdict
from nipq_search.search.jobs import TEST_FILE, Job
from nipq_search.search.results import documents
from nipq_search.search.run import open_ledger
from nipq_search.search.study.ledger import BUDGET, Ledger

EVERYTHING = ["float", "lsq-4", "trial-000", "trial-001", "trial-002", "trial-003", "test"]


@pytest.fixture(autouse=True)
def _local_study(monkeypatch):
    monkeypatch.delenv("NIPQ_STORAGE_URL", raising=False)
    monkeypatch.delenv("NIPQ_STORAGE_URL_FILE", raising=False)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "sweep", make_config())


def figures(bench):
    """Return the ledger's entries of all trials, except times and attempts."""
    return [
        (t.number, t.state.name, t.params, t.values, t.user_attrs.get("budget"), t.constraints)
        for t in bench.ledger.trials()
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The entries of an undisturbed sweep."""
    bench = Bench(tmp_path_factory.mktemp("whole"), make_config())
    bench.sweep()
    return figures(bench)


def with_test_figures(bench):
    return {path.parent.relative_to(bench.out).as_posix() for path in bench.out.rglob(TEST_FILE)}


def test_a_whole_sweep(bench):
    coordinator = bench.sweep()
    assert bench.executed == EVERYTHING
    assert not coordinator.has_work() and coordinator.failure is None
    trials = bench.ledger.trials()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 4
    assert [t.params[BUDGET] for t in trials] == [0, 1, 0, 1]
    for trial in trials:
        budget = bench.facts.budgets[trial.params[BUDGET]]
        assert trial.user_attrs["budget"] == budget.label
        assert trial.user_attrs["budget_bops"] == budget.targets["bops"]
        assert trial.user_attrs["budget_slack"] == pytest.approx(-0.02)
        assert trial.values[1] == trial.user_attrs["cost_bops"]
        assert trial.values[0] == trial.user_attrs["validation_accuracy"]
        assert trial.user_attrs["strategy"] == "independent"
    assert len({t.user_attrs["seed"] for t in trials}) == 4
    front = {t.number for t in bench.ledger.study.best_trials}
    assert coordinator.front() == front and 0 < len(front) < 4


def test_the_test_split_is_evaluated_for_shown_results_only(bench):
    coordinator = bench.sweep()
    front = {f"trials/{number}" for number in coordinator.front()}
    assert with_test_figures(bench) == {"float", "baselines/lsq-4", *front}


def crash_after(patch, owner, name, *, when, before=False):
    """Crash the driver in the `when`-th call of a method, before or after the call's work."""
    original, calls = getattr(owner, name), []

    def method(*args, **kwargs):
        calls.append(1)
        if len(calls) == when and before:
            raise Crash
        result = original(*args, **kwargs)
        if len(calls) == when:
            raise Crash
        return result

    patch.setattr(owner, name, method)


BOUNDARIES = {
    "within the ask": (Ledger, "_suggest", True),
    "after the ask": (Ledger, "ask", False),
    "before the attributes of the start": (Ledger, "note", True),
    "after the record": (Bench, "execute", False),
    "before the constraint": (optuna.trial.Trial, "set_constraint", True),
    "after the attributes": (optuna.Study, "tell", True),
    "after the tell": (optuna.Study, "tell", False),
    "after the end": (Ledger, "complete", False),
}


@pytest.mark.parametrize("when", [1, 3])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_crash_neither_loses_nor_repeats_work(boundary, when, bench, whole, monkeypatch):
    owner, name, before = BOUNDARIES[boundary]
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, owner, name, when=when, before=before)
        bench.sweep()
    bench.sweep()
    assert figures(bench) == whole
    assert sorted(bench.executed) == sorted(EVERYTHING)


def test_a_committed_record_is_told_before_any_job_runs(bench, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, Bench, "execute", when=3)
        bench.sweep()
    bench.open()
    assert [t.state for t in bench.ledger.trials()] == [TrialState.COMPLETE]


def test_a_coordinator_writes_nothing_before_it_reconciles(bench, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, Bench, "execute", when=3)
        bench.sweep()
    ledger, resolved = open_ledger(bench.config, digits(), bench.out)
    coordinator = Coordinator(
        config=bench.config, resolved=resolved, ledger=ledger, out=bench.out, run="later"
    )
    assert [t.state for t in ledger.trials()] == [TrialState.RUNNING]
    coordinator.reconcile()
    assert [t.state for t in ledger.trials()] == [TrialState.COMPLETE]


def test_repeated_crashes_of_the_driver(bench, whole, monkeypatch):
    for owner, name, before in BOUNDARIES.values():
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_after(patch, owner, name, when=1, before=before)
            bench.sweep()
    bench.sweep()
    assert figures(bench) == whole
    assert sorted(bench.executed) == sorted(EVERYTHING)


def test_stopped_jobs_keep_their_number(bench, whole):
    coordinator = bench.open()
    for _ in range(2):
        job = coordinator.next_job()
        bench.execute(job)
        coordinator.finished(job)
    first, second = coordinator.next_job(), coordinator.next_job()
    assert (first.name, second.name) == ("trial-000", "trial-001")
    assert coordinator.stage == "trials"
    coordinator.stop()
    assert coordinator.next_job() is Verdict.DONE and not coordinator.has_work()
    for job in (second, first):
        (jobs.open_attempt(job) / jobs.STOPPED).write_text("{}")
        coordinator.finished(job)
    assert coordinator.remaining_trials() == 4
    again = bench.open()
    resumed = [again.next_job() for _ in range(2)]
    assert [(j.name, j.params, j.budget, j.seed) for j in resumed] == [
        (j.name, j.params, j.budget, j.seed) for j in (first, second)
    ]
    bench.sweep()
    assert figures(bench) == whole


def test_a_trial_whose_worker_alone_was_stopped_is_restarted(bench):
    coordinator = bench.open()
    for _ in range(2):
        job = coordinator.next_job()
        bench.execute(job)
        coordinator.finished(job)
    job = coordinator.next_job()
    coordinator.finished(job)
    assert coordinator.next_job().name == job.name


def test_nothing_runs_concurrently_with_the_float_model(bench):
    coordinator = bench.open()
    job = coordinator.next_job()
    assert job.kind == "float" and coordinator.stage == "float model"
    assert coordinator.next_job() is Verdict.WAIT
    bench.execute(job)
    coordinator.finished(job)
    assert coordinator.next_job().kind == "baseline" and coordinator.stage == "baselines"


def test_failing_trials_are_recorded_and_the_sweep_continues(bench):
    bench.fail = lambda job: "loss became NaN" if job.name == "trial-001" else None
    bench.sweep()
    states = [t.state.name for t in bench.ledger.trials()]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    failed = bench.ledger.trials()[1]
    assert failed.user_attrs["reason"] == "loss became NaN" and failed.user_attrs["samples"] == 100
    budgets = [t.params[BUDGET] for t in bench.ledger.trials() if t.state.name == "COMPLETE"]
    assert budgets == [0, 1, 0], "a failed trial does not count for its budget"


def test_all_trials_may_fail(bench):
    bench.fail = lambda job: "no luck" if job.kind == "trial" else None
    coordinator = bench.sweep()
    assert [t.state.name for t in bench.ledger.trials()] == ["FAIL"] * 4
    assert coordinator.front() == set() and coordinator.failure is None
    assert with_test_figures(bench) == {"float", "baselines/lsq-4"}


def test_without_a_float_model_nothing_starts(bench):
    bench.fail = lambda job: "out of memory" if job.kind == "float" else None
    coordinator = bench.sweep()
    assert bench.executed == ["float"] and not bench.ledger.trials()
    assert coordinator.failure.startswith("the float model failed: out of memory; ")
    again = bench.sweep()
    assert bench.executed == ["float"] and again.failure == coordinator.failure
    assert not again.has_work()


def test_after_a_failed_float_model_the_configuration_may_change(bench):
    bench.fail = lambda job: "no such weights" if job.kind == "float" else None
    coordinator = bench.sweep()
    folder = bench.out / "float"
    assert f"then remove {folder} to start over" in coordinator.failure
    budgets = [{"bops": "uniform 5"}]
    bench.config = make_config(budgets=budgets, search__space={"lr": {"log": [0.1, 0.2]}})
    with pytest.raises(UserError, match=f"budgets: .*; or remove {folder}, whose job failed"):
        bench.open()
    shutil.rmtree(folder)
    bench.fail = lambda job: None
    assert bench.sweep().failure is None
    assert bench.ledger.recall("budgets") == budgets
    assert [t.state.name for t in bench.ledger.trials()] == ["COMPLETE"] * 4
    bench.config = make_config()
    with pytest.raises(UserError, match="budgets: ") as error:
        bench.open()
    assert "remove" not in str(error.value)


def test_a_study_for_the_other_direction_is_refused(bench, monkeypatch):
    bench.open()
    monkeypatch.setattr(digits(), "metric", ("loss", "min"))
    with pytest.raises(UserError, match="was created with mode 'max', but loss has mode 'min'"):
        bench.open()


def test_processes_that_die_before_their_attempt_begins(bench):
    coordinator, started = bench.open(), []
    while isinstance(job := coordinator.next_job(), Job):
        started.append(job.name)
        if job.kind in ("float", "test"):
            bench.execute(job)
        coordinator.finished(
            job, "its process died" if job.kind in ("baseline", "trial") else None
        )
    assert started == EVERYTHING
    reasons = {t.user_attrs["reason"] for t in bench.ledger.trials()}
    assert reasons == {"its process died"}


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [({"loss": 1.0}, "evaluate() returned no 'accuracy'")],
)
def test_a_record_without_the_metric_is_a_failure(metrics, reason, bench, monkeypatch):
    record = Bench.record
    monkeypatch.setattr(
        Bench, "record", lambda self, job: {**record(self, job), "metrics": metrics}
    )
    bench.sweep()
    assert {t.user_attrs["reason"] for t in bench.ledger.trials()} == {reason}


def test_no_trial_starts_after_the_sample_limit(bench):
    bench.enough = lambda: documents.total_samples(bench.out) >= 400
    coordinator = bench.sweep()
    assert bench.executed == [*EVERYTHING[:4], "test"]
    assert coordinator.remaining_trials() == 2
    bench.enough = lambda: False
    bench.sweep()
    assert [name for name in bench.executed if name != "test"] == EVERYTHING[:-1]


def test_adding_trials_and_budgets_repeats_no_training(bench):
    bench.sweep()
    before = figures(bench)
    bench.sweep()
    assert bench.executed == EVERYTHING, "the sweep was finished"
    # Budgets keep the ledger's order regardless of the file's, and new ones are appended.
    budgets = [{"weight_bytes": "uniform 4"}, *bench.config.budgets[::-1]]
    bench.config = make_config(search__trials=7, search__front_cost="bops", budgets=budgets)
    bench.executed.clear()
    bench.sweep()
    assert figures(bench)[:4] == before
    assert bench.executed[:3] == ["trial-004", "trial-005", "trial-006"]
    assert [t.params[BUDGET] for t in bench.ledger.trials()][4:] == [2, 2, 0]


def test_trials_enqueued_with_optuna_are_run(bench):
    bench.open()
    study = bench.ledger.study
    study.enqueue_trial({"lr": 0.09, BUDGET: 1})
    study.enqueue_trial({"lr": 0.08})
    bench.sweep()
    trials = bench.ledger.trials()
    assert len(trials) == 4, "enqueued trials count toward search.trials"
    assert [t.params["lr"] for t in trials[:2]] == [0.09, 0.08]
    assert [t.params[BUDGET] for t in trials[:2]] == [1, 0]
    study.enqueue_trial({"lr": 0.07})
    bench.sweep()
    assert bench.ledger.trials()[4].params["lr"] == 0.07
    assert [t.state.name for t in bench.ledger.trials()] == ["COMPLETE"] * 5


@pytest.mark.filterwarnings("ignore:Fixed parameter")
@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({BUDGET: 7}, "budget: index 7 is not one of 0..1"),
        ({"lr": -0.5}, "lr: "),
        ({"lr": "fast"}, "lr: 'fast'"),
        ({"distill_weight": 3}, "distill_weight: "),
    ],
)
def test_enqueued_trials_that_cannot_be_used_fail_with_a_reason(wanted, reason, bench):
    bench.open()
    bench.ledger.study.enqueue_trial(wanted)
    bench.sweep()
    trials = bench.ledger.trials()
    assert trials[0].state is TrialState.FAIL and reason in trials[0].user_attrs["reason"]
    assert [t.state.name for t in trials[1:]] == ["COMPLETE"] * 3
    assert "trial-000" not in bench.executed


def test_changed_data_prevents_a_resume(bench, monkeypatch):
    bench.sweep()
    monkeypatch.setattr(
        "nipq_search.search.run.dataset",
        lambda task: {"name": "x", "splits": {}, "digest": "f" * 64},
    )
    with pytest.raises(Exception, match="the data of sweep 'unit' have changed since it began"):
        bench.sweep()


def test_a_relative_float_checkpoint_is_absolute_only_in_jobs(tmp_path, monkeypatch):
    """Ray's workers have a different working directory."""
    monkeypatch.chdir(tmp_path)
    torch.save(digits().build_model().state_dict(), tmp_path / "float.pt")
    bench = Bench(tmp_path / "sweep", make_config(float={"checkpoint": "float.pt"}))
    job = bench.open().next_job()
    assert job.config["float"]["checkpoint"] == str(tmp_path / "float.pt")
    assert bench.ledger.recall("config")["float"]["checkpoint"] == "float.pt"


def test_the_ladder_starts_from_finished_trials_and_keeps_its_decisions(tmp_path):
    search = {"trials": 4, "strategy": "ladder", "baselines": [], "sampler": "random"}
    bench = Bench(tmp_path / "sweep", make_config(search=search))
    coordinator = bench.open()
    bench.execute(first := coordinator.next_job())
    coordinator.finished(first)  # the float model
    stopped = coordinator.next_job()  # proposed before any trial has finished
    other = coordinator.next_job()
    assert stopped.parent is None and other.parent is None
    bench.execute(other)
    coordinator.finished(other)
    coordinator.finished(stopped)  # stopped without a record
    parents = {}
    bench.sweep(lambda job: parents.update({job.name: job.parent}) or bench.execute(job))
    assert parents["trial-000"] is None, "the parent was chosen before the stop"
    assert [t.user_attrs["parent"] for t in bench.ledger.trials()] == [
        None,
        None,
        parents["trial-002"],
        parents["trial-003"],
    ]
    assert parents["trial-003"] is not None
    trial = bench.view().record(3)
    assert trial.parent == parents["trial-003"]
