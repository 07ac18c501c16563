"""Compare corrections of regrets for the length of training runs, on a surrogate.

    python benchmarks/regrets.py --page docs/front-quality.md

With `fill`, some training runs are short and score lower for that reason alone. Each variant of
the correction passes different regrets to the sampler; all variants use the same seeds. The
criterion is the true metric of the best-scoring full training run of each budget.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial
from pages import write_table

from nipq_search.search.strategies.samplers import Observation, RegretSampler
from nipq_search.search.study.ledger import Ledger

SPACE = {
    "lr": FloatDistribution(0.005, 0.5, log=True),
    "distill_weight": FloatDistribution(0.2, 0.9),
    "noise_share": FloatDistribution(0.0, 0.3),
}
PLACES = {"middle": 0.05, "off it": 0.12, "edge": 0.3}
"""Best learning rate of the surrogate, by its position in the range."""
BUDGETS, SHORT, FIRST, NOISE = 5, 0.3, 0.75, 0.002
COST = {1.0: 0.0, FIRST: 0.007, SHORT: 0.02}
"""Reduction of the metric, by the share of the epochs that a training run uses."""

Regrets = list[tuple[float, FrozenTrial]]
Variant = Callable[[Sequence[Observation], Mapping[tuple[int, int], float]], Regrets]
plain: Variant = RegretSampler.regrets


def _share(trial: FrozenTrial) -> float:
    """Return the share of the epochs for which a trial was trained."""
    return float(trial.user_attrs["share"])


def less_mean(
    observations: Sequence[Observation], best: Mapping[tuple[int, int], float]
) -> Regrets:
    """Return regrets, less the mean regret of the trials with the same training length."""
    by_length: dict[float, list[float]] = {}
    for regret, trial in plain(observations, best):
        by_length.setdefault(_share(trial), []).append(regret)
    mean = {share: statistics.fmean(regrets) for share, regrets in by_length.items()}
    return [(r - mean[_share(t)], t) for r, t in plain(observations, best)]


def _fitted(observations: Sequence[Observation]) -> tuple[list[float], dict[float, float]]:
    """Fit a linear model in budget and length; return its residuals and the effects of lengths."""
    columns = sorted({("length", _share(x.trial)) for x in observations})
    columns += sorted({("budget", float(x.budget)) for x in observations})
    rows = np.zeros((len(observations), len(columns)))
    for row, observation in zip(rows, observations, strict=True):
        row[columns.index(("length", _share(observation.trial)))] = 1
        row[columns.index(("budget", float(observation.budget)))] = 1
    metrics = np.array([observation.levels[-1] for observation in observations])
    ridge = 1e-3 * np.eye(len(columns))
    wanted = np.concatenate([metrics, np.zeros(len(columns))])
    fitted = np.linalg.lstsq(np.vstack([rows, ridge]), wanted, rcond=None)[0]
    lengths = [value for kind, value in columns if kind == "length"]
    effects = dict(zip(lengths, map(float, fitted), strict=False))
    return [float(left) for left in metrics - rows @ fitted], effects


def linear(observations: Sequence[Observation], best: Mapping[tuple[int, int], float]) -> Regrets:
    """Return the residuals of a linear model in budget and length, in place of regrets."""
    left = _fitted(observations)[0] if observations else []
    return [(r, x.trial) for r, x in zip(left, observations, strict=True)]


def less_fitted(
    observations: Sequence[Observation], best: Mapping[tuple[int, int], float]
) -> Regrets:
    """Return regrets, less the fitted effect of the length relative to the longest length."""
    effects = _fitted(observations)[1] if observations else {}
    longest = effects[max(effects)] if effects else 0.0
    return [(r - effects[_share(t)] + longest, t) for r, t in plain(observations, best)]


VARIANTS: dict[str, Variant] = {
    "as it is": plain,
    "less the mean of the length": less_mean,
    "linear in budget and length": linear,
    "less the fitted length": less_fitted,
}


def searched(seed: int, rate: float, trials: int) -> float:
    """Run a search; return the mean over budgets of the true metric of the best-scoring full run.

    Args:
        seed: seed of the study and of the noise.
        rate: the best learning rate of the surrogate.
        trials: number of trials.

    Returns:
        The mean, without the noise with which the sampler observes the metric.
    """
    generator = random.Random(seed)
    study = optuna.create_study(directions=["maximize", "minimize"])
    ledger = Ledger(study, space=SPACE, sampler="tpe", seed=seed)
    best: dict[int, tuple[float, float]] = {}
    for number in range(trials):
        budget, share = number, FIRST if number == 0 else SHORT
        if number >= BUDGETS:
            budget = generator.randrange(BUDGETS)
            share = SHORT if generator.random() < 0.25 else 1.0
        asked = ledger.ask(budget, BUDGETS)
        chosen = asked.params
        true = -0.01 * math.log(chosen["lr"] / rate) ** 2 - 0.01 * budget
        true -= 0.03 * (chosen["distill_weight"] - 0.7) ** 2
        true -= 0.05 * (chosen["noise_share"] - 0.1) ** 2
        measured = 0.9 + true - COST[share] + generator.gauss(0, NOISE)
        ledger.note(asked.number, {"share": share})
        ledger.complete(asked.number, (measured, 2.0**-budget), {}, 0.0)
        if share == 1.0:
            best[budget] = max(best.get(budget, (-math.inf, 0.0)), (measured, true))
    return statistics.fmean(true for _, true in best.values())


def main() -> None:
    """Compare all variants; print the table and write it to the page, if one is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--trials", type=int, nargs="+", default=[30])
    parser.add_argument("--page", type=Path, help="page whose table is updated")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    settings = [(place, trials) for trials in options.trials for place in PLACES]
    lines = [
        "| regrets | " + " | ".join(f"{place}, {trials}" for place, trials in settings) + " |",
        "|---" * (len(settings) + 1) + "|",
    ]
    ours: dict[tuple[str, int], list[float]] = {}
    for name, variant in VARIANTS.items():
        RegretSampler.regrets = staticmethod(variant)  # type: ignore[method-assign, assignment]
        cells = []
        for place, trials in settings:
            found = [searched(s, PLACES[place], trials) for s in range(options.seeds)]
            base = ours.setdefault((place, trials), found)
            leads = [1e4 * (a - b) for a, b in zip(found, base, strict=True)]
            error = statistics.stdev(leads) / len(leads) ** 0.5
            cells.append(f"{statistics.fmean(leads):+.1f} ± {error:.1f}" if found != base else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if options.page:
        write_table(options.page, "regrets", "\n".join(lines))


if __name__ == "__main__":
    main()
