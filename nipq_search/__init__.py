"""Mixed-precision quantization search: a Pareto front of trained models from one call.

The quantizers, costs and training loop require only torch, numpy and scipy. Ray, Optuna, MLflow
and the other dependencies are imported on first use of a name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nipq_search.version import __version__ as __version__

if TYPE_CHECKING:
    from nipq_search.cost import Budget, cost_penalty, freeze, profile
    from nipq_search.errors import UserError
    from nipq_search.quant import (
        ActivationConfig,
        QuantConfig,
        WeightConfig,
        apply_bit_config,
        bit_config,
        param_groups,
        prepare,
        reestimate_norm_stats,
    )
    from nipq_search.search.config.sweep_config import SweepConfig
    from nipq_search.search.results.sweep import Sweep
    from nipq_search.search.run import search

_HOME = {
    "ActivationConfig": "quant",
    "Budget": "cost",
    "QuantConfig": "quant",
    "Sweep": "search.results.sweep",
    "SweepConfig": "search.config.sweep_config",
    "UserError": "errors",
    "WeightConfig": "quant",
    "apply_bit_config": "quant",
    "bit_config": "quant",
    "cost_penalty": "cost",
    "freeze": "cost",
    "param_groups": "quant",
    "prepare": "quant",
    "profile": "cost",
    "reestimate_norm_stats": "quant",
}

__all__ = [
    "ActivationConfig",
    "Budget",
    "QuantConfig",
    "Sweep",
    "SweepConfig",
    "UserError",
    "WeightConfig",
    "apply_bit_config",
    "bit_config",
    "cost_penalty",
    "freeze",
    "param_groups",
    "prepare",
    "profile",
    "reestimate_norm_stats",
    "search",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first access."""
    # `nipq_search.search` is a callable package: return it, so that `search` is the same object
    # whether or not the package has been imported before.
    if name == "search":
        return importlib.import_module(f"{__name__}.search")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
