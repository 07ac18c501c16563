"""Successive halving: which trial is promoted, and sweeps that pause, promote and prune."""

from __future__ import annotations

import time

import pytest
from optuna.trial import TrialState
from unit_helpers import Bench, make_config

from nipq_search import file_io
from nipq_search.search import jobs
from nipq_search.search.strategies.halving import Standing, to_promote
from nipq_search.search.strategies.samplers import RUNGS
from nipq_search.search.strategies.strategies import STRATEGIES
from nipq_search.search.study.ledger import BUDGET


def standing(number, *metrics, bracket=0, paused=True, pruned=False):
    return Standing(number=number, bracket=bracket, metrics=metrics, paused=paused, pruned=pruned)


def test_one_of_three_trials_is_promoted():
    two = [standing(0, 0.5), standing(1, 0.7)]
    assert to_promote(two, last=False) is None
    assert to_promote([*two, standing(2, 0.6)], last=False) == 1
    gone = [standing(0, 0.5), standing(1, 0.7, paused=False), standing(2, 0.6)]
    assert to_promote(gone, last=False) is None
    assert to_promote([*gone, *(standing(n, 0.1) for n in (3, 4, 5))], last=False) == 2


def test_trials_compete_only_within_their_budget():
    cheap = [standing(n, 0.1 * n, bracket=1) for n in range(3)]
    dear = [standing(n, 0.5 + 0.1 * n, bracket=0) for n in range(3, 5)]
    assert to_promote([*cheap, *dear], last=False) == 2
    assert to_promote(dear, last=False) is None


def test_higher_rungs_are_promoted_first():
    low = [standing(n, 0.5) for n in range(3)]
    high = [standing(n, 0.6, 0.7 + n / 100) for n in range(3, 6)]
    assert to_promote([*low, *high], last=False) == 5


def test_at_the_end_one_trial_per_budget_finishes():
    assert to_promote([standing(0, 0.5), standing(1, 0.7)], last=True) == 1
    assert to_promote([standing(0, 0.5), standing(1, 0.7, paused=False)], last=True) is None
    assert to_promote([standing(0, 0.5), standing(1, 0.7, 0.8)], last=True) == 1
    failed_later = [standing(0, 0.5), standing(1, 0.4, paused=False, pruned=True)]
    assert to_promote(failed_later, last=True) == 0, "the promoted trial failed later"


class Rungs(Bench):
    """A sweep whose trials pause at rungs and whose metric is a function of the learning rate."""

    def execute(self, job):
        rungs = STRATEGIES[self.config.search.strategy].rungs
        if job.kind != "trial" or job.rung >= len(rungs):
            return super().execute(job)
        self.executed.append(f"{job.name}, rung {job.rung}")
        attempt = jobs.open_attempt(job)
        progress = {"samples": 10, "epoch": 1, "time": time.time()}
        file_io.write_json(attempt / jobs.PROGRESS, progress)
        metrics = {"accuracy": 0.4 + float(job.params["lr"])}
        file_io.write_sealed(
            jobs.rung_file(job.folder, job.rung), {"metrics": metrics, "samples": 0}
        )
        file_io.write_json(attempt / jobs.STOPPED, {"time": 0})
        return jobs.JobOutcome(kind=jobs.OutcomeKind.PAUSED)


@pytest.fixture
def bench(tmp_path):
    options = {"search__strategy": "halving", "search__trials": 18, "search__baselines": []}
    return Rungs(tmp_path / "sweep", make_config(**options))


def check(bench):
    """Check that three of the nine trials per budget are promoted and that the best finishes."""
    trials = bench.ledger.trials()
    assert {t.state for t in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    for budget in (0, 1):
        own = [t for t in trials if t.params[BUDGET] == budget]
        reached = {t.number: len(jobs.rung_records(bench.out / f"trials/{t.number}")) for t in own}
        assert len(own) == 9
        assert sum(count == 2 for count in reached.values()) >= 3
        complete = [t for t in own if t.state is TrialState.COMPLETE]
        assert complete and all(reached[t.number] == 2 for t in complete)
        best = max(own, key=lambda t: t.params["lr"])
        assert best.state is TrialState.COMPLETE, "the synthetic metric has no noise"
        for trial in own:
            if trial.state is TrialState.PRUNED:
                assert "was not among the best for its budget" in trial.user_attrs["reason"]
                assert trial.user_attrs["samples"] == 10 * reached[trial.number]
            metrics = [0.4 + trial.params["lr"]] * reached[trial.number]
            assert trial.user_attrs[RUNGS] == pytest.approx(metrics), "the sampler learns from it"


def test_a_sweep_of_rungs(bench):
    coordinator = bench.sweep()
    check(bench)
    assert not coordinator.has_work()
    assert bench.view().status()["states"]["PRUNED"] > 10
    assert sum(name.endswith("rung 0") for name in bench.executed) == 18


@pytest.mark.parametrize("every", [1, 4])
def test_rungs_are_restored_after_a_crash(bench, every):
    """Start a new driver every few jobs; it restores paused, promoted and finished trials."""
    for _ in range(200):
        coordinator = bench.open()
        for _ in range(every):
            job = coordinator.next_job()
            if not isinstance(job, jobs.Job):
                break
            bench.execute(job)
            coordinator.finished(job)
        if not coordinator.has_work():
            break
    check(bench)
    assert len(bench.executed) == len(set(bench.executed)), "nothing ran twice"


def test_a_crash_between_promotion_and_start(bench):
    """The study stores the promotion, so the trial continues to the same rung."""
    coordinator = bench.open()
    while True:
        job = coordinator.next_job()
        if job.kind == "trial" and job.rung == 1:
            break
        bench.execute(job)
        coordinator.finished(job)
    again = bench.open().next_job()
    assert (again.number, again.rung) == (job.number, 1)
    assert again.budget == job.budget and again.seed == job.seed
    bench.sweep()
    check(bench)


def test_a_missing_rung_metric_ranks_worst_if_the_metric_is_minimized(bench, monkeypatch):
    history = bench.open().trials.history
    monkeypatch.setattr(history, "_sign", -1)
    signed_metric = [
        history.signed_metric(metrics) for metrics in ({"accuracy": 0.3}, {"accuracy": 0.4}, {})
    ]
    assert signed_metric == sorted(signed_metric, reverse=True)


def test_adding_trials_does_not_revive_pruned_ones(bench):
    bench.sweep()
    pruned = {t.number for t in bench.ledger.trials() if t.state is TrialState.PRUNED}
    section = bench.config.search.model_copy(update={"trials": 24})
    bench.config = bench.config.model_copy(update={"search": section})
    bench.sweep()
    trials = bench.ledger.trials()
    assert len(trials) == 24
    assert pruned <= {t.number for t in trials if t.state is TrialState.PRUNED}
