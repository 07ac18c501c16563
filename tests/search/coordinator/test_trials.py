"""The next trial: its targets after a crash, failing budgets, enqueued trials, scores."""

from __future__ import annotations

from optuna.trial import TrialState
from unit_helpers import Bench, Crash, make_config

from nipq_search.search.jobs import Job
from nipq_search.search.study.ledger import BUDGET


def test_a_trial_interrupted_before_its_target_was_noted_gets_the_same_target(tmp_path):
    """Kill the driver after `ask`, before it records the targets that `fill` chose."""
    options = {"search__strategy": "fill", "search__trials": 6, "search__baselines": []}
    config = make_config(**options)

    def decided(job):
        return job.number, dict(job.budget), job.parent, job.epochs_share

    def run(bench, cut):
        found, torn = [], set()
        coordinator = bench.open()
        while True:
            if cut and len(bench.ledger.trials()) not in torn:
                torn.add(len(bench.ledger.trials()))

                def crash(number, attributes):
                    raise Crash

                coordinator.ledger.note = crash
            try:
                job = coordinator.next_job()
            except Crash:
                coordinator = bench.open()
                continue
            if not isinstance(job, Job):
                return found
            coordinator.ledger.__dict__.pop("note", None)
            if job.kind == "trial":
                found.append(decided(job))
            bench.execute(job)
            coordinator.finished(job)

    whole, cut = Bench(tmp_path / "whole", config), Bench(tmp_path / "cut", config)
    expected = run(whole, cut=False)
    named = [dict(budget.targets) for budget in whole.facts.budgets]
    assert any(budget not in named for _, budget, _, _ in expected)
    assert run(cut, cut=True) == expected
    assert cut.runs > 6


def test_a_budget_whose_trials_always_fail_does_not_use_up_all_trials(tmp_path):
    bench = Bench(tmp_path / "sweep", make_config(search__trials=10, search__baselines=[]))
    bench.open()
    dear = dict(bench.facts.budgets[0].targets)
    bench.fail = lambda job: "no luck" if dict(job.budget) == dear else None
    bench.sweep()
    states = [t.state for t in bench.ledger.trials()]
    assert states.count(TrialState.COMPLETE) >= 3


def test_the_sampler_uses_the_enqueued_budget(tmp_path):
    bench = Bench(tmp_path / "sweep", make_config(search__sampler="tpe"))
    coordinator = bench.open()
    bench.ledger.study.enqueue_trial({BUDGET: 1})
    assert coordinator.ledger.ask(0, 2).budget == 1
    assert coordinator.ledger.study.sampler._budget == 1


def test_scores_come_between_the_float_model_and_the_trials(tmp_path):
    bench = Bench(tmp_path / "sweep", make_config(train__start="sensitivity"))
    bench.sweep()
    assert bench.executed[:3] == ["float", "sensitivity", "lsq-4"]
    assert bench.executed.count("sensitivity") == 1
    bench.sweep()
    assert bench.executed.count("sensitivity") == 1


def test_failed_scores_end_the_sweep_with_a_reason(tmp_path):
    bench = Bench(tmp_path / "sweep", make_config(train__start="sensitivity"))
    bench.fail = lambda job: "no luck" if job.kind == "sensitivity" else None
    coordinator = bench.sweep()
    folder = bench.out / "sensitivity"
    assert coordinator.failure == (
        f"the sensitivity scores failed: no luck; fix this, then remove {folder} to start over"
    )
    assert not any(name.startswith("trial") for name in bench.executed)
    assert bench.open().failure == coordinator.failure, "a later run fails the same way"


def test_only_sweeps_that_may_need_scores_measure_them(tmp_path):
    bench = Bench(tmp_path / "plain", make_config())
    bench.sweep()
    assert "sensitivity" not in bench.executed
    space = {"start": {"choice": ["budget", "sensitivity"]}}
    assert make_config(search__space=space).needs_scores
