"""A sampler: Optuna's TPE with fewer random trials at the start."""

from __future__ import annotations

from optuna.samplers import TPESampler

from nipq_search.search.strategies.samplers import SamplerFactory

PARZEN = SamplerFactory(
    lambda seed: TPESampler(seed=seed, n_startup_trials=5), learns_by_regret=True
)
