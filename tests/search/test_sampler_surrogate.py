"""Where the best `lambda` depends on the budget, the default sampler beats its rivals."""

from __future__ import annotations

import math
import random
import statistics

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler, TPESampler

from nipq_search.search.config import SearchSection
from nipq_search.search.ledger import BUDGET, Ledger
from nipq_search.search.sampler import SAMPLERS

BUDGETS, TRIALS, SEEDS = 5, 60, 24
SPACE = {
    "lambda": FloatDistribution(1, 300, log=True),
    "lr": FloatDistribution(0.005, 0.5, log=True),
    "noise_share": FloatDistribution(0, 1),
}


def metric(budget, params):
    """Best at lambda 3 for the largest budget, up to 100 for the smallest; one lr for all."""
    best = math.log(3) + math.log(100 / 3) * budget / (BUDGETS - 1)
    return (
        0.9
        - 0.01 * budget
        - 0.02 * (math.log(params["lambda"]) - best) ** 2
        - 0.02 * (math.log(params["lr"] / 0.05)) ** 2
        - 0.05 * (params["noise_share"] - 0.25) ** 2
    )


def searched(sampler, seed, sign=1):
    """Mean over the budgets of the true metric of what looks best after a search."""
    noise = random.Random(seed)
    study = optuna.create_study(directions=["maximize" if sign > 0 else "minimize", "minimize"])
    ledger = Ledger(study, space=SPACE, sampler=sampler, seed=seed)
    best = {}
    for number in range(TRIALS):
        asked = ledger.ask(number % BUDGETS, BUDGETS)
        assert asked.budget == number % BUDGETS
        seen = metric(asked.budget, asked.params) + noise.gauss(0, 0.001)
        ledger.complete(asked.number, (sign * seen, 2.0**-asked.budget), {}, 0.0)
        best[asked.budget] = max(
            best.get(asked.budget, (-1, {})), (seen, dict(asked.params)), key=lambda b: b[0]
        )
    return statistics.fmean(metric(budget, params) for budget, (_, params) in best.items())


@pytest.fixture(scope="module")
def default():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return [searched(SearchSection().sampler, seed) for seed in range(SEEDS)]


@pytest.mark.parametrize(
    "rival",
    [
        lambda seed: RandomSampler(seed=seed),
        lambda seed: TPESampler(seed=seed, n_startup_trials=10),
    ],
    ids=["random", "univariate TPE"],
)
def test_the_default_sampler_beats_its_rivals(default, rival, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "rival", rival)
    theirs = [searched("rival", seed) for seed in range(SEEDS)]
    leads = [a - b for a, b in zip(default, theirs, strict=True)]
    error = statistics.stdev(leads) / SEEDS**0.5
    assert statistics.fmean(leads) > 2 * error


def test_a_metric_that_is_minimized_is_searched_the_same_way(default):
    assert searched(SearchSection().sampler, 0, sign=-1) == pytest.approx(default[0])


@pytest.mark.filterwarnings("ignore:Fixed parameter lr")
def test_foreign_trials_do_not_disturb():
    """Failed, pruned, enqueued and running ones, and such of another space."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    ledger = Ledger(study, space=SPACE, sampler="tpe", seed=0)
    study.enqueue_trial({BUDGET: 1, "lr": 77.0})
    study.add_trial(optuna.trial.create_trial(params={}, distributions={}, values=[0.1, 1.0]))
    for number in range(30):
        asked = ledger.ask(number % 3, 3)
        if number % 5 == 0:
            ledger.fail(asked.number, "no luck", {})
        elif number % 5 == 1:
            ledger.prune(asked.number, {})
        elif number % 5 < 4:
            ledger.complete(asked.number, (0.5, 1.0), {}, 0.0)
    assert study.trials[-1].params.keys() == {BUDGET, *SPACE}
