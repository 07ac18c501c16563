"""nipq_search: trained mixed-precision quantization fronts, from one call.

The quantizer, the costs and the training loop need torch alone; ray, optuna, mlflow and the rest
are loaded only when something that needs them is asked for.
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
    """Import a public name when it is first asked for."""
    if name == "search":  # function and package in one, whichever is imported first
        return importlib.import_module(f"{__name__}.search")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return __all__
