"""Costs of quantized models, budgets, and the projection of bit-widths onto a budget.

Start reading in `base.py`: a cost is one formula, counted exactly on integer bits (`exact_cost`)
and estimated on learned ones (`cost_estimate`). The projection is solved in `projection.py` and
`assignment.py`. Imports `quant`, and needs torch, numpy and scipy alone.
"""

from nipq_search.cost import activations, average, bops, size
from nipq_search.cost.base import COSTS, Cost, cost_estimate, exact_cost, exact_costs

for _cost in (
    bops.BOPS,
    size.WEIGHT_BYTES,
    activations.SUM,
    activations.LARGEST,
    average.MEAN_WEIGHT_BITS,
    average.MEAN_ACTIVATION_BITS,
):
    COSTS.register(_cost.name, _cost)

from nipq_search.cost.bops import CONVENTION  # noqa: E402
from nipq_search.cost.budget import Budget, cost_penalty  # noqa: E402
from nipq_search.cost.profile import layer_rows, profile  # noqa: E402
from nipq_search.cost.projection import freeze, project  # noqa: E402

__all__ = [
    "CONVENTION",
    "COSTS",
    "Budget",
    "Cost",
    "cost_estimate",
    "cost_penalty",
    "exact_cost",
    "exact_costs",
    "freeze",
    "layer_rows",
    "profile",
    "project",
]
