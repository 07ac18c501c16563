"""Costs of quantized models, budgets, and the projection of bit-widths onto a budget.

Start reading in `base.py`: a cost is a single formula, evaluated exactly on integer bit-widths
(`exact_cost`) and differentiably on learned ones (`cost_estimate`). `projection.py` and
`assignment.py` implement the projection. This layer imports `quant` and requires only torch, numpy
and scipy.
"""

from nipq_search.cost import activations, bops, mean_bits, size
from nipq_search.cost.base import COSTS, Cost, cost_estimate, exact_cost, exact_costs

for _cost in (
    bops.BOPS,
    size.WEIGHT_BYTES,
    activations.SUM,
    activations.LARGEST,
    mean_bits.MEAN_WEIGHT_BITS,
    mean_bits.MEAN_ACTIVATION_BITS,
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
