"""The default sampler against its rivals, on a surrogate whose best `lambda` depends on budget."""

from __future__ import annotations

import math
import random
import statistics

import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import RandomSampler, TPESampler

from nipq_search.search.config.sweep_config import SearchSection
from nipq_search.search.strategies.halving import Standing, to_promote
from nipq_search.search.strategies.samplers import RUNGS, SAMPLERS, SamplerFactory, tpe
from nipq_search.search.study.ledger import BUDGET, Ledger

BUDGETS, TRIALS, SEEDS = 5, 60, 24
SPACE = {
    "lambda": FloatDistribution(1, 300, log=True),
    "lr": FloatDistribution(0.005, 0.5, log=True),
    "noise_share": FloatDistribution(0, 1),
}


def metric(budget, params):
    """Return a metric whose best `lambda` is 3 to 100 by budget, with one best learning rate."""
    best = math.log(3) + math.log(100 / 3) * budget / (BUDGETS - 1)
    return (
        0.9
        - 0.01 * budget
        - 0.02 * (math.log(params["lambda"]) - best) ** 2
        - 0.02 * (math.log(params["lr"] / 0.05)) ** 2
        - 0.05 * (params["noise_share"] - 0.25) ** 2
    )


def searched(sampler, seed, sign=1):
    """Search, and return the true metric of the apparently best trials, averaged over budgets."""
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
def test_the_default_sampler_beats_its_rivals(default, rival):
    with SAMPLERS.temporarily("rival", SamplerFactory(rival)):
        theirs = [searched("rival", seed) for seed in range(SEEDS)]
    leads = [a - b for a, b in zip(default, theirs, strict=True)]
    error = statistics.stdev(leads) / SEEDS**0.5
    assert statistics.fmean(leads) > 2 * error


def test_a_metric_that_is_minimized_is_searched_the_same_way(default):
    assert searched(SearchSection().sampler, 0, sign=-1) == pytest.approx(default[0])


@pytest.mark.filterwarnings("ignore:Fixed parameter lr")
def test_foreign_trials_do_not_disturb():
    """Failed, pruned, enqueued and running trials, and trials from another space."""
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


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_the_first_trial_under_a_budget_takes_the_middle(sampler):
    space = {
        "lr": FloatDistribution(0.01, 1.0, log=True),
        "noise_share": FloatDistribution(0.2, 0.4),
        "bits.stem": IntDistribution(2, 8),
        "proxy": CategoricalDistribution(["uniform", "empirical"]),
    }
    study = optuna.create_study(directions=["maximize", "minimize"])
    ledger = Ledger(study, space=space, sampler=sampler, seed=0)
    middle = {"lr": 0.1, "noise_share": 0.3, "bits.stem": 5, "proxy": "uniform"}
    for budget in (1, 0, 2):
        asked = ledger.ask(budget, 3)
        assert (asked.budget, asked.params) == (budget, pytest.approx(middle))
    ledger.fail(0, "the middle is no good", {})
    assert ledger.ask(1, 3).params["lr"] != 0.1


SHARES = (1 / 9, 1 / 3, 1.0)
"""Fractions of the training at each rung and at the end."""


def early(budget, params, share):
    """Return the metric after part of the training: lower, with a higher best learning rate."""
    rate = {**params, "lr": params["lr"] / math.exp(1 - share)}
    return metric(budget, rate) - 0.1 * (1 - share)


def halved(taught, seed, allowance=24):
    """Search as `searched` does, by successive halving, for `allowance` full trainings in all."""
    noise = random.Random(seed)
    study = optuna.create_study(directions=["maximize", "minimize"])
    ledger = Ledger(study, space=SPACE, sampler="tpe", seed=seed)
    asked, reached, ended, spent = {}, {}, {}, 0.0
    while spent < allowance:
        standings = [
            Standing(
                number=n, bracket=asked[n].budget, metrics=reached[n][:2], paused=n not in ended
            )
            for n in asked
        ]
        number = to_promote(standings, last=False)
        if number is None:
            new = ledger.ask(len(asked) % BUDGETS, BUDGETS)
            number, asked[new.number], reached[new.number] = new.number, new, []
        budget, params, metrics = asked[number].budget, asked[number].params, reached[number]
        rung = len(metrics)
        spent += SHARES[rung] - (SHARES[rung - 1] if rung else 0)
        metrics.append(early(budget, params, SHARES[rung]) + noise.gauss(0, 0.002))
        if rung == 2:
            ended[number] = metrics[-1]
            ledger.complete(number, (metrics[-1], 2.0**-budget), {}, 0.0)
        elif taught:
            ledger.note(number, {RUNGS: metrics})
    best = {}
    for number, seen in ended.items():
        one = (seen, metric(asked[number].budget, asked[number].params))
        best[asked[number].budget] = max(best.get(asked[number].budget, (-1, 0)), one)
    return statistics.fmean(true for _, true in best.values())


def test_rungs_teach_the_sampler(default):
    """Without rung metrics, only the few finished trials would inform a halving search."""
    leads = [halved(True, seed) - halved(False, seed) for seed in range(10)]
    assert statistics.fmean(leads) > 2 * statistics.stdev(leads) / len(leads) ** 0.5


def test_a_rung_without_a_number_is_the_worst():
    """This holds even if no trial with the budget has a finite metric."""
    shown = []

    class Spy(type(tpe(0))):
        def sample_relative(self, study, trial, search_space):
            shown.extend(t.value for t in study.trials if t.state.is_finished())
            return super().sample_relative(study, trial, search_space)

    spy = SamplerFactory(lambda seed: Spy(seed=seed), learns_by_regret=True)
    with SAMPLERS.temporarily("tpe", spy):
        study = optuna.create_study(directions=["minimize", "minimize"])
        ledger = Ledger(study, space=SPACE, sampler="tpe", seed=0)
        for rungs in ([None], [None, 0.5], [0.3]):
            ledger.note(ledger.ask(0, 2).number, {RUNGS: rungs})
        ledger.note(ledger.ask(1, 2).number, {RUNGS: [None]})
        shown.clear()
        ledger.ask(0, 2)
    assert shown == [float("-inf"), 0.0, 0.0, float("-inf")]
