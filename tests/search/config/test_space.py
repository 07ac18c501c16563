"""Search spaces, samplers and strategies; tests iterate over the registries."""

from __future__ import annotations

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from nipq_search.errors import UserError
from nipq_search.search.config.space import check_space, distribution
from nipq_search.search.strategies.expected_gain import Axes
from nipq_search.search.strategies.samplers import SAMPLERS
from nipq_search.search.strategies.strategies import (
    STRATEGIES,
    Finished,
    SearchState,
    least_served,
)
from nipq_search.search.study.proposals import suggest
from nipq_search.train import HYPERPARAMETERS
from nipq_search.train.config import BitStart, TuningMode

SPACE = {
    "lr": {"log": [0.01, 0.1]},
    "noise_share": {"uniform": [0.1, 0.6]},
    "lambda": {"int": [1, 50]},
    "distill_weight": {"choice": [0, 0.5, 1]},
}


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"log": [0.01, 0.1]}, FloatDistribution(0.01, 0.1, log=True)),
        ({"uniform": [0, 1]}, FloatDistribution(0, 1)),
        ({"int": [1, 5]}, IntDistribution(1, 5)),
        ({"choice": ["a", 2, None]}, CategoricalDistribution(["a", 2, None])),
    ],
)
def test_forms(form, expected):
    assert distribution("lr", form) == expected


@pytest.mark.parametrize(
    "form",
    [{}, {"log": [1, 2], "int": [1, 2]}, {"normal": [0, 1]}, {"log": [1]}, {"log": [0, 1]}]
    + [{"uniform": [1, 1]}, {"uniform": ["a", "b"]}, {"uniform": [False, True]}]
    + [{"int": [2, 1]}, {"int": [1.5, 3]}, {"choice": [[1]]}, {"choice": []}],
)
def test_wrong_forms_name_the_hyperparameter(form):
    with pytest.raises(UserError, match=r"^search\.space\.lr"):
        distribution("lr", form)


def test_every_hyperparameter_can_be_searched():
    words = {"proxy": ["uniform", "empirical"]}
    words |= {"start": [*map(str, BitStart)], "tuning": [*map(str, TuningMode)]}
    for name in HYPERPARAMETERS:
        check_space({name: {"choice": words.get(name, [0.1, 0.2])}})


def study_of(sampler):
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)


def propose(name, seed, history):
    """Return a proposal after a history of results."""
    study = study_of(SAMPLERS["random"](0))
    for index in range(history):
        trial = study.ask()
        values = {key: suggest(trial, key, distribution(key, form)) for key, form in SPACE.items()}
        study.tell(trial, [values["lr"], float(index)])
    study.sampler = SAMPLERS[name](seed)
    trial = study.ask()
    return {key: suggest(trial, key, distribution(key, form)) for key, form in SPACE.items()}


@pytest.mark.parametrize("history", [0, 12])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_samplers_propose_reproducibly_within_the_space(name, history):
    proposals = [propose(name, seed, history) for seed in (3, 3, 4)]
    assert proposals[0] == proposals[1] != proposals[2]
    for proposal in proposals:
        for key, form in SPACE.items():
            allowed = distribution(key, form)
            assert allowed._contains(allowed.to_internal_repr(proposal[key]))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_samplers_handle_failed_trials(name):
    study = study_of(None)
    for number in range(14):
        study.sampler = SAMPLERS[name](number)
        trial = study.ask()
        values = {key: suggest(trial, key, distribution(key, form)) for key, form in SPACE.items()}
        if number % 4 == 3:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, [values["lr"], values["noise_share"]])
    assert len({trial.params["lr"] for trial in study.trials}) == 14


BUDGETS = ({"bops": 400.0}, {"bops": 200.0}, {"bops": 100.0}, {"bops": 80.0}, {"bops": 70.0})
AXES = Axes(cost="bops", least=60.0, most=1600.0, reference=0.7, best=0.9)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@pytest.mark.parametrize("budgets", [1, 2, 5])
def test_strategies_serve_every_budget(name, budgets):
    strategy, assigned, finished, served = STRATEGIES[name](), [], [], []
    for number in range(3 * budgets):
        seen = SearchState(
            budgets=BUDGETS[:budgets], assigned=list(assigned), finished=list(finished), axes=AXES
        )
        target = strategy.assign(seen)
        assert target == STRATEGIES[name]().assign(seen), "no hidden state"
        assert 0 <= target.budget < budgets
        targets = dict(target.targets or BUDGETS[target.budget])
        assert AXES.least <= targets["bops"] <= AXES.most
        parent = strategy.parent(targets, finished)
        assert parent is None or parent in {trial.number for trial in finished}
        assigned.append(target.budget)
        served.append(targets)
        metric = 0.9 - 5.0 / targets["bops"]
        finished.append(Finished(number=number, cost=targets, metric=metric))
    assert set(assigned) == set(range(budgets))
    assert all(budget in served for budget in BUDGETS[:budgets])


def test_the_least_served_budget_is_next():
    def served(assigned, budgets):
        return least_served(SearchState(budgets=BUDGETS[:budgets], assigned=assigned))

    assert served([], 3) == 0
    assert served([0, 0, 1, 2, 2], 3) == 1
    assert served([0, 1], 3) == 2
    assert served([0, 1, 7, -1], 2) == 0, "somebody enqueued unknown budgets"
