"""Costs: formulas over bit-widths, estimated for the loss and evaluated exactly for reports.

To add a cost, write a file that defines a `Cost` and register it in `cost/__init__.py`. Other
packages declare an entry point instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nipq_search.quant.graph import FLOAT_BITS, Graph
from nipq_search.quant.insertion.prepare import quant_state, quantizers
from nipq_search.registry import Registry

Bits = Mapping[str, Any]
"""Bit-widths by tensor name: integers, floats, or tensors with a gradient."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A cost of a quantized model.

    Attributes:
        name: name in budgets and tables, including the unit.
        terms: computes the contributions, by layer or tensor, from the bit-widths of *every*
            tensor. No contribution may decrease when a bit-width increases.
        combine: reduces the terms to the cost; `sum_terms` or `largest_term`.
        whole: whether the exact cost at integer bit-widths is rounded up to an integer.
    """

    name: str
    terms: Callable[[Graph, Bits], dict[str, Any]]
    combine: Callable[[dict[str, Any]], Any]
    whole: bool = True


def sum_terms(terms: dict[str, Any]) -> Any:
    """Return the sum of the terms."""
    return sum(terms.values())


def largest_term(terms: dict[str, Any]) -> Any:
    """Return the largest term; gradients flow only to that term."""
    return max(terms.values(), key=lambda t: float(t.detach() if isinstance(t, Tensor) else t))


def _problem(name: str, value: Any) -> str | None:
    if not isinstance(value, Cost):
        return "not a nipq_search.cost.Cost"
    if name == "slack":  # the study has an attribute `budget_slack`
        return "this name is reserved"
    return None if value.name == name else f"its name is '{value.name}'"


COSTS: Registry[Cost] = Registry("cost", group="nipq_search.costs", check=_problem)
"""Costs by name. The cost of a plug-in is reported only if a configuration names it."""


def get_cost(name: str) -> Cost:
    """Return the cost registered as `name`.

    Raises:
        UserError: no cost has this name, or the plug-in that provides the cost cannot be used.
    """
    return COSTS[name]


def complete_bits(graph: Graph, bits: Bits) -> dict[str, Any]:
    """Return `bits`, extended with the fixed widths of the tensors that it does not contain.

    Tensors without a fixed width count as 32 bits.
    """
    fixed = {
        name: FLOAT_BITS if tensor.fixed_bits is None else tensor.fixed_bits
        for name, tensor in graph.tensors.items()
        if name not in bits
    }
    return {**fixed, **bits}


def exact_cost(name: str, graph: Graph, bits: Bits) -> float:
    """Return the exact cost, the value that is reported and compared with budgets.

    Fractional widths are accepted, for budgets such as `uniform 2.5`. A cost with `whole` is
    rounded up to an integer if all widths are integers; other costs are rounded to 12 significant
    digits.

    Args:
        name: name of the cost.
        graph: the model's layers and tensors.
        bits: bit-widths of the tensors that have a quantizer.

    Returns:
        The cost in its own unit.

    Raises:
        UserError: no cost has this name, or the plug-in that provides the cost cannot be used.
    """
    cost = get_cost(name)
    value = float(cost.combine(cost.terms(graph, complete_bits(graph, bits))))
    if cost.whole and all(float(b).is_integer() for b in bits.values()):
        return math.ceil(value)
    # This rounding makes the mean of equal widths exactly equal to the common width.
    return value if cost.whole else float(f"{value:.12g}")


def exact_costs(model: nn.Module) -> dict[str, float]:
    """Return every registered cost of a prepared model at its hard bit-widths, by name."""
    graph, bits = quant_state(model).graph, hard_bits(model)
    return {name: exact_cost(name, graph, bits) for name in COSTS}


def cost_estimate(name: str, model: nn.Module) -> Tensor:
    """Return the cost at the soft bit-widths as a differentiable scalar, for use in the loss.

    Raises:
        UserError: no cost has this name, the plug-in that provides the cost cannot be used, or the
            model is not prepared.
    """
    cost = get_cost(name)
    soft = {tensor: quantizer.bits.soft() for tensor, quantizer in quantizers(model).items()}
    graph = quant_state(model).graph
    value = cost.combine(cost.terms(graph, complete_bits(graph, soft)))
    if not isinstance(value, Tensor):  # the cost depends on no quantized tensor
        value = torch.tensor(float(value), device=next(model.parameters()).device)
    return value.reshape(())


def hard_bits(model: nn.Module) -> dict[str, int]:
    """Return the hard bit-widths of a prepared model by tensor name."""
    return {name: quantizer.bits.hard() for name, quantizer in quantizers(model).items()}


def uniform_bits(graph: Graph, bits: float) -> dict[str, float]:
    """Return `bits` for every tensor that has a choice, and the only allowed width of the others.

    Tensors without a quantizer are omitted.
    """
    return {
        name: bits if len(tensor.allowed) > 1 else tensor.allowed[0]
        for name, tensor in graph.tensors.items()
        if tensor.allowed
    }


def extreme_bits(graph: Graph, most: bool) -> dict[str, int]:
    """Return the smallest or, with `most`, the largest allowed width of each quantized tensor."""
    end = -1 if most else 0
    return {name: t.allowed[end] for name, t in graph.tensors.items() if t.allowed}
