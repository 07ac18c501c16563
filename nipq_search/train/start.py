"""Where bit-widths start: at the budget, from the float model or from a finished trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nipq_search.cost import Budget
from nipq_search.cost.base import exact_cost
from nipq_search.cost.projection import usage
from nipq_search.quant import quantizers
from nipq_search.quant.graph import Graph
from nipq_search.quant.prepare import quant_state

_BISECTIONS = 40


def bits_at_budget(
    graph: Graph, budget: Budget, base: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Soft bit-widths that cost the budget: `base` plus one shift for all, by bisection.

    Tensors that no budgeted cost counts, such as an embedding under BOPs, start at their most.

    Args:
        graph: a model's layers and tensors.
        budget: its binding target is met as closely as the allowed spans let it.
        base: bit-widths by tensor; None for equal ones, which gives the uniform width.
    """
    spans = {name: t.allowed for name, t in graph.tensors.items() if t.allowed}

    def shifted(shift: float) -> dict[str, float]:
        return {
            name: min(max((base[name] if base else 0.0) + shift, allowed[0]), allowed[-1])
            if counted[name] or base
            else most[name]
            for name, allowed in spans.items()
        }

    most = {name: float(allowed[-1]) for name, allowed in spans.items()}
    counted = {
        name: any(
            exact_cost(cost, graph, {**most, name: float(allowed[0])})
            < exact_cost(cost, graph, most)
            for cost in budget
        )
        for name, allowed in spans.items()
    }
    low, high = -16.0, 32.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if usage(graph, shifted(middle), budget) > 1:
            high = middle
        else:
            low = middle
    return shifted(low)


def start_at_budget(
    model: nn.Module, budget: Budget, base: Mapping[str, float] | None = None
) -> None:
    """Let every learned bit-width start where the cost is the budget; see `bits_at_budget`.

    Short noise phases need it: from 8 bits most of them would be spent on the way down.
    """
    bits = bits_at_budget(quant_state(model).graph, budget, base)
    for name, quantizer in quantizers(model).items():
        quantizer.start_at(bits[name])


def warm_start(model: nn.Module, state: Mapping[str, Any]) -> dict[str, float]:
    """Take weights, boundaries and normalization from a finished trial's state, in place.

    Bit-widths stay free, and the noise stays the model's own.

    Args:
        model: a prepared model that has not been trained.
        state: state dict of a frozen model of the same architecture and quantizer.

    Returns:
        The finished trial's bit-widths by tensor.

    Raises:
        RuntimeError: the state does not fit the model.
    """
    graph, found = quant_state(model).graph, quantizers(model)
    modules = {name: module for name, module in model.named_modules()}
    bits = {
        module.name: float(state[f"{path}.bits.frozen"])
        for path, module in modules.items()
        if module in found.values()
    }
    for name, quantizer in found.items():
        if len(graph.tensors[name].allowed) > 1:
            quantizer.start_at(bits[name])
    fresh = model.state_dict()

    def own(key: str) -> bool:
        return ".bits." in key or key.endswith("_extra_state")

    model.load_state_dict({k: fresh[k] if own(k) else state.get(k, v) for k, v in fresh.items()})
    return bits
