"""The default sampler and others on a surrogate whose best `lambda` depends on the budget."""

from __future__ import annotations

import sys
from pathlib import Path

import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import sampler
from sampler import SPACE, searched

from nipq_search.search.config.sweep_config import SearchSection
from nipq_search.search.strategies.samplers import RUNGS, SAMPLERS, SamplerFactory, tpe
from nipq_search.search.study.ledger import BUDGET, Ledger

SEEDS = 6
"""The benchmark uses 24 seeds."""


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def test_the_default_sampler_beats_its_rivals():
    for name, (mean, error) in sampler.leads_over_rivals(SEEDS).items():
        assert mean > 2 * error, name


def test_a_metric_that_is_minimized_is_searched_the_same_way():
    default = SearchSection().sampler
    assert searched(default, 0, sign=-1) == pytest.approx(searched(default, 0))


@pytest.mark.filterwarnings("ignore:Fixed parameter lr")
def test_foreign_trials_do_not_disturb():
    """Such trials failed, were pruned or enqueued, are running, or have a different space."""
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


def test_rungs_teach_the_sampler():
    """Without rung metrics, only the few finished trials would inform a halving search."""
    mean, error = sampler.lead_of_rungs(10)
    assert mean > 2 * error


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


def test_running_trials_are_shown():
    """Otherwise, TPE and GP would propose the same point for several concurrent trials."""
    shown = []

    class Spy(type(tpe(0))):
        def sample_relative(self, study, trial, search_space):
            running = [t for t in study.trials[:-1] if t.state is TrialState.RUNNING]
            shown.append([t.params["lr"] for t in running])
            return super().sample_relative(study, trial, search_space)

    spy = SamplerFactory(lambda seed: Spy(seed=seed), learns_by_regret=True)
    with SAMPLERS.temporarily("tpe", spy):
        study = optuna.create_study(directions=["maximize", "minimize"])
        ledger = Ledger(study, space=SPACE, sampler="tpe", seed=0)
        asked = [ledger.ask(0, 5).params["lr"] for _ in range(3)]
        ledger.complete(0, (0.5, 1.0), {}, 0.0)
        ledger.ask(0, 5)
    assert shown == [asked[:1], asked[:2], asked[1:]]
