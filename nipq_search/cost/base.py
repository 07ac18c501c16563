"""What a cost is: one formula over bit-widths, used soft by the loss and exact by the report.

To add a cost write one file with a `Cost` and one line that registers it in
`cost/__init__.py`; another package offers an entry point instead.
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
        name: what budgets and tables call it, with its unit.
        terms: the contributions by layer or tensor, given bit-widths of *every* tensor. They
            do not fall when a bit-width rises.
        combine: the cost from its terms; `sum_terms` or `largest_term`.
        whole: whether the exact count is rounded up to an integer.
    """

    name: str
    terms: Callable[[Graph, Bits], dict[str, Any]]
    combine: Callable[[dict[str, Any]], Any]
    whole: bool = True


def sum_terms(terms: dict[str, Any]) -> Any:
    """The sum of the contributions."""
    return sum(terms.values())


def largest_term(terms: dict[str, Any]) -> Any:
    """The largest contribution; differentiable in it."""
    return max(terms.values(), key=lambda t: float(t.detach() if isinstance(t, Tensor) else t))


def _problem(name: str, value: Any) -> str | None:
    if not isinstance(value, Cost):
        return "not a nipq_search.cost.Cost"
    return None if value.name == name else f"the cost calls itself '{value.name}'"


COSTS: Registry[Cost] = Registry("cost", group="nipq_search.costs", check=_problem)
"""Costs by name. A plug-in's cost is computed and reported once a configuration names it."""


def get_cost(name: str) -> Cost:
    """Return the cost called `name`.

    Raises:
        UserError: no such cost exists, or its plug-in cannot be used.
    """
    return COSTS[name]


def complete_bits(graph: Graph, bits: Bits) -> dict[str, Any]:
    """`bits` with those of the tensors that have no quantizer added."""
    fixed = {
        name: FLOAT_BITS if tensor.fixed_bits is None else tensor.fixed_bits
        for name, tensor in graph.tensors.items()
        if name not in bits
    }
    return {**fixed, **bits}


def exact_cost(name: str, graph: Graph, bits: Bits) -> float:
    """The exact cost of integer bit-widths: what is reported and what budgets are held against.

    Also evaluates the formula at fractional widths, for budgets such as `uniform 2.5`; only
    integer widths are rounded up to whole units.
    """
    cost = get_cost(name)
    value = float(cost.combine(cost.terms(graph, complete_bits(graph, bits))))
    if cost.whole and all(float(b).is_integer() for b in bits.values()):
        return math.ceil(value)
    return value if cost.whole else float(f"{value:.12g}")  # a mean of twos is 2


def exact_costs(model: nn.Module) -> dict[str, float]:
    """Every exact cost of a prepared model at its hard bit-widths."""
    graph, bits = quant_state(model).graph, hard_bits(model)
    return {name: exact_cost(name, graph, bits) for name in COSTS}


def cost_estimate(name: str, model: nn.Module) -> Tensor:
    """The cost at the soft bit-widths, a scalar, differentiable: what the loss uses."""
    cost = get_cost(name)
    soft = {tensor: quantizer.bits.soft() for tensor, quantizer in quantizers(model).items()}
    graph = quant_state(model).graph
    value = cost.combine(cost.terms(graph, complete_bits(graph, soft)))
    if not isinstance(value, Tensor):  # no quantized tensor takes part in it
        value = torch.tensor(float(value), device=next(model.parameters()).device)
    return value.reshape(())


def hard_bits(model: nn.Module) -> dict[str, int]:
    """Integer bit-widths of a prepared model by tensor name."""
    return {name: quantizer.bits.hard() for name, quantizer in quantizers(model).items()}


def uniform_bits(graph: Graph, bits: float) -> dict[str, float]:
    """`bits` for every searched tensor; pinned ones keep their own."""
    return {
        name: bits if len(tensor.allowed) > 1 else tensor.allowed[0]
        for name, tensor in graph.tensors.items()
        if tensor.allowed
    }


def extreme_bits(graph: Graph, most: bool) -> dict[str, int]:
    """The least, or the most, allowed bits of every tensor that has a quantizer."""
    end = -1 if most else 0
    return {name: t.allowed[end] for name, t in graph.tensors.items() if t.allowed}
