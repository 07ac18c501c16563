"""Optuna's samplers by the names that sweep files use.

To add one, write a function from a seed to a sampler and a line in `SAMPLERS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler


def tpe(seed: int) -> BaseSampler:
    """Tree-structured Parzen estimator; running trials count as bad, to keep workers apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(seed=seed, n_startup_trials=10, multivariate=True, constant_liar=True)


def random(seed: int) -> BaseSampler:
    """Independent draws."""
    return RandomSampler(seed=seed)


def gp(seed: int) -> BaseSampler:
    """A Gaussian process; its time grows with the cube of the trials, fine up to some 300."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return GPSampler(seed=seed, n_startup_trials=10, deterministic_objective=False)


def nsga2(seed: int) -> BaseSampler:
    """A genetic algorithm, in generations of ten: a sweep has tens of trials."""
    return NSGAIISampler(seed=seed, population_size=10)


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": tpe,
    "random": random,
    "gp": gp,
    "nsga2": nsga2,
}
"""Samplers by name; each takes the trial's own seed, so a resumed search repeats nothing."""
