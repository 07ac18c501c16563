"""Search spaces, and the order in which budgets are assigned."""

from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from nipq_search.errors import UserError
from nipq_search.search.config.space import check_space, distribution
from nipq_search.search.strategies.strategies import (
    SearchState,
    least_served,
)
from nipq_search.train import HYPERPARAMETERS
from nipq_search.train.config import BitStart, TuningMode


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


def test_the_least_served_budget_is_next():
    def served(assigned, budgets):
        return least_served(SearchState(budgets=[{"bops": 400.0}] * budgets, assigned=assigned))

    assert served([], 3) == 0
    assert served([0, 0, 1, 2, 2], 3) == 1
    assert served([0, 1], 3) == 2
    assert served([0, 1, 7, -1], 2) == 0, "enqueued trials with unknown budgets are ignored"
