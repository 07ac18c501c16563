"""Compare the default sampler with others where the best `lambda` depends on the budget.

    python benchmarks/sampler.py

The metric of a trial comes from a surrogate, without training. The script prints the mean lead of
the default over each rival with its standard error, over paired seeds. For successive halving, it
prints the lead gained by passing the metrics at rungs to the sampler.
`tests/search/strategies/test_sampler_surrogate.py` runs a few of the seeds.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from nipq_search.search.config.sweep_config import SearchSection
from nipq_search.search.strategies.halving import Standing, to_promote
from nipq_search.search.strategies.samplers import RUNGS, SAMPLERS, SamplerFactory
from nipq_search.search.study.ledger import Ledger

BUDGETS, TRIALS = 5, 60
SPACE = {
    "lambda": FloatDistribution(1, 300, log=True),
    "lr": FloatDistribution(0.005, 0.5, log=True),
    "noise_share": FloatDistribution(0, 1),
}


def metric(budget: int, params: dict[str, Any]) -> float:
    """Return the metric of a trial; the best `lambda` grows from 3 to 100 over the budgets."""
    best = math.log(3) + math.log(100 / 3) * budget / (BUDGETS - 1)
    return (
        0.9
        - 0.01 * budget
        - 0.02 * (math.log(params["lambda"]) - best) ** 2
        - 0.02 * (math.log(params["lr"] / 0.05)) ** 2
        - 0.05 * (params["noise_share"] - 0.25) ** 2
    )


def searched(sampler: str, seed: int, sign: int = 1) -> float:
    """Run a search; return the true metric of the best-scoring trials, averaged over budgets.

    Args:
        sampler: name of a registered sampler.
        seed: seed of the sampler and of the noise that is added to the metric.
        sign: 1 if the study maximizes the metric; -1 if it minimizes the negated metric.

    Returns:
        The mean metric, without noise and with its original sign.
    """
    noise = random.Random(seed)
    study = optuna.create_study(directions=["maximize" if sign > 0 else "minimize", "minimize"])
    ledger = Ledger(study, space=SPACE, sampler=sampler, seed=seed)
    best = {}
    for number in range(TRIALS):
        asked = ledger.ask(number % BUDGETS, BUDGETS)
        assert asked.budget == number % BUDGETS
        measured = metric(asked.budget, asked.params) + noise.gauss(0, 0.001)
        ledger.complete(asked.number, (sign * measured, 2.0**-asked.budget), {}, 0.0)
        best[asked.budget] = max(
            best.get(asked.budget, (-1, {})), (measured, dict(asked.params)), key=lambda b: b[0]
        )
    return statistics.fmean(metric(budget, params) for budget, (_, params) in best.items())


SHARES = (1 / 9, 1 / 3, 1.0)
"""Fractions of the training completed at each rung and at the end."""


def early(budget: int, params: dict[str, Any], share: float) -> float:
    """Return the metric after part of a training run, which favors a higher learning rate.

    Args:
        budget: index of the budget.
        params: hyperparameters of the trial.
        share: fraction of the training completed, from 0 to 1.

    Returns:
        The metric without noise; for a share of 1, that of `metric`.
    """
    rate = {**params, "lr": params["lr"] / math.exp(1 - share)}
    return metric(budget, rate) - 0.1 * (1 - share)


def halved(with_rungs: bool, seed: int, allowance: float = 24) -> float:
    """Run successive halving; return the true metric of the best trials, averaged over budgets.

    Args:
        with_rungs: whether the sampler receives the metrics at rungs.
        seed: seed of the sampler and of the noise that is added to the metric.
        allowance: total amount of training, in full training runs.

    Returns:
        The mean metric, without noise, of the best-scoring finished trials.
    """
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
        elif with_rungs:
            ledger.note(number, {RUNGS: metrics})
    best = {}
    for number, measured in ended.items():
        one = (measured, metric(asked[number].budget, asked[number].params))
        best[asked[number].budget] = max(best.get(asked[number].budget, (-1, 0)), one)
    return statistics.fmean(true for _, true in best.values())


RIVALS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "univariate TPE": lambda seed: TPESampler(seed=seed, n_startup_trials=10),
}


def lead(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of paired values and its standard error."""
    leads = [a - b for a, b in zip(ours, theirs, strict=True)]
    return statistics.fmean(leads), statistics.stdev(leads) / len(leads) ** 0.5


def leads_over_rivals(seeds: int) -> dict[str, tuple[float, float]]:
    """Return the mean lead of the default sampler over each rival, and its standard error."""
    ours = [searched(SearchSection().sampler, seed) for seed in range(seeds)]
    leads = {}
    for name, rival in RIVALS.items():
        with SAMPLERS.temporarily("rival", SamplerFactory(rival)):
            leads[name] = lead(ours, [searched("rival", seed) for seed in range(seeds)])
    return leads


def lead_of_rungs(seeds: int) -> tuple[float, float]:
    """Return the lead that successive halving gains if the sampler receives metrics at rungs."""
    return lead(
        *([halved(with_rungs, seed) for seed in range(seeds)] for with_rungs in (True, False))
    )


def main() -> None:
    """Print the lead over each rival, and the lead gained from metrics at rungs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=24)
    seeds = parser.parse_args().seeds
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = {**leads_over_rivals(seeds), "halving without rungs": lead_of_rungs(seeds)}
    print(f"| lead over | mean, {seeds} seeds | standard error |\n|---|---|---|")
    for name, (mean, error) in rows.items():
        print(f"| {name} | {mean:+.4f} | {error:.4f} |")


if __name__ == "__main__":
    main()
