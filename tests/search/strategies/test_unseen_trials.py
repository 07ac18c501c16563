"""Incremental reading of a growing study gives the same results as reading all of it."""

from __future__ import annotations

import random

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from unit_helpers import Bench, make_config

from nipq_search.search.coordinator import history as history_module
from nipq_search.search.results import documents
from nipq_search.search.strategies.pareto import non_dominated
from nipq_search.search.strategies.unseen_trials import UnseenTrials


def trial(number: int, state: TrialState) -> FrozenTrial:
    found = create_trial(state=state, value=0.5 if state is TrialState.COMPLETE else None)
    found.number = number
    return found


def test_finished_trials_are_returned_once_and_others_every_time():
    unseen = UnseenTrials()
    states = [TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL, TrialState.WAITING]
    found = [trial(number, state) for number, state in enumerate(states)]
    assert [t.number for t in unseen.take(found)] == [0, 1, 2, 3]
    assert [t.number for t in unseen.take(found)] == [1, 3]
    found = [*found[:1], trial(1, TrialState.PRUNED), *found[2:], trial(4, TrialState.COMPLETE)]
    assert [t.number for t in unseen.take(found)] == [1, 3, 4]
    assert [t.number for t in unseen.take(found)] == [3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished sweep of twelve trials, two of which failed."""
    config = make_config(search__trials=12, search__strategy="fill")
    bench = Bench(tmp_path_factory.mktemp("sweep"), config)
    bench.fail = lambda job: "no luck" if job.name in ("trial-002", "trial-005") else None
    bench.sweep()
    return bench


def test_incremental_records_equal_fresh_ones(finished):
    found = finished.ledger.trials()
    kept = documents.Records(finished.view().facts, finished.out)
    for end in (1, 2, 5, 9, len(found)):
        records = kept.update(found[:end])
        fresh = documents.Records(finished.view().facts, finished.out)
        assert records == fresh.update(found[:end])
        assert kept.front == fresh.front == {r.trial for r in records if r.on_front}
        assert (kept.states, kept.best) == (fresh.states, fresh.best)


def test_an_incremental_front_equals_the_front_of_all_points():
    luck = random.Random(3)
    points = {n: (round(luck.random(), 1), round(luck.random(), 1)) for n in range(300)}
    front: set[int] = set()
    for number in points:
        rivals = {n: points[n] for n in [*front, number]}
        front = non_dominated(rivals, "max")
        assert front == non_dominated({n: points[n] for n in range(number + 1)}, "max")


def test_a_strategy_sees_the_newest_trials_and_the_front(finished, monkeypatch):
    own = finished.open().trials
    own.history.update(own.ledger.trials())
    whole = own.history.recent()
    assert [t.number for t in whole] == [n for n in range(12) if n not in (2, 5)]
    monkeypatch.setattr(history_module, "MAX_FINISHED", 3)
    shown = [t.number for t in own.history.recent()]
    front = {r.trial for r in finished.view().trials() if r.on_front}
    assert shown == sorted({*shown[-3:], *front}) and shown[-3:] == [9, 10, 11]


def test_the_epochs_of_a_resumed_trial_do_not_depend_on_its_parents_age(finished, monkeypatch):
    own = finished.open().trials
    own.history.update(own.ledger.trials())
    budget = finished.facts.budgets[0].targets
    before = own._epochs_share(budget, 0)
    assert before != own._epochs_share(budget, None)
    monkeypatch.setattr(history_module, "MAX_FINISHED", 1)
    monkeypatch.setattr(own.history, "_front", [])
    assert own._epochs_share(budget, 0) == before


def test_records_include_a_finished_trial_added_by_a_user(finished):
    found = finished.ledger.trials()
    found = [*found, trial(len(found), TrialState.COMPLETE)]
    found[-1].values = [0.7, 1.0]
    records = documents.Records(finished.view().facts, finished.out)
    assert [r.state for r in records.update(found)][-1] == "COMPLETE"
