"""Where bit-widths start: at the budget, by scores, from a finished trial, or all equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nipq_search.cost import Budget
from nipq_search.cost.base import Bits, complete_bits, get_cost, uniform_bits
from nipq_search.cost.projection import MIN_USAGE, Losses, assign, project, units_of, usage
from nipq_search.errors import UserError
from nipq_search.quant import quantizers
from nipq_search.quant.graph import Graph
from nipq_search.quant.insertion.prepare import freeze_bits, quant_state
from nipq_search.quant.quantizers.bit_width import BitWidth

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

    def terms(bits: Mapping[str, float]) -> list[float]:
        complete = complete_bits(graph, bits)
        return [
            float(v) for cost in budget for v in get_cost(cost).terms(graph, complete).values()
        ]

    # Of terms, for a cost may be the largest of them.
    whole = terms(most)
    counted = {
        name: terms({**most, name: float(allowed[0])}) != whole for name, allowed in spans.items()
    }
    low, high = -16.0, 32.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if usage(graph, shifted(middle), budget) > 1:
            high = middle
        else:
            low = middle
    return shifted(low)


def _begin(
    model: nn.Module, learning: bool, bits: Mapping[str, float], fixed: Callable[[], Bits]
) -> None:
    """Put widths that learn at `bits`; fix the others at `fixed`, for good."""
    if learning:
        for name, quantizer in quantizers(model).items():
            quantizer.start_at(bits[name])
    else:
        freeze_bits(model, fixed())


def start_at_budget(
    model: nn.Module,
    budget: Budget,
    base: Mapping[str, float] | None = None,
    learning: bool = True,
) -> None:
    """Let every bit-width start where the cost is the budget; see `bits_at_budget`.

    Short noise phases need it: from 8 bits most of them would be spent on the way down.

    Args:
        model: prepared.
        budget: what the widths cost.
        base: as there.
        learning: whether widths are learned from there; else they are projected and fixed.
    """
    graph, found = quant_state(model).graph, quantizers(model)
    bits = bits_at_budget(graph, budget, base)
    marginal = {name: float(quantizer.bits.marginal) for name, quantizer in found.items()}
    _begin(model, learning, bits, lambda: project(graph, budget, bits, marginal))


def stay_at_parent(
    model: nn.Module, budget: Budget, bits: Mapping[str, float], learning: bool = True
) -> bool:
    """Keep the widths of a parent that is at this budget already: they may have been learned.

    Args:
        model: prepared.
        budget: what the widths are to keep and use up.
        bits: the parent's widths by tensor.
        learning: whether widths are learned from there; else they are fixed.

    Returns:
        Whether they fit; the model is as it was where they do not.
    """
    fixed = {name: round(width) for name, width in bits.items()}
    if not MIN_USAGE <= usage(quant_state(model).graph, fixed, budget) <= 1:
        return False
    _begin(model, learning, bits, lambda: fixed)
    return True


def start_at_scores(
    model: nn.Module, budget: Budget, losses: Losses, learning: bool = True
) -> None:
    """Let every bit-width start where the measured loss is least.

    Args:
        model: prepared.
        budget: what the widths keep.
        losses: by unit (see `units_of`) and allowed width; see `sensitivities`.
        learning: whether widths are learned from there; else they are fixed.

    Raises:
        UserError: the scores are those of another model.
    """
    graph = quant_state(model).graph
    for unit in units_of(graph):
        if not set(graph.tensors[unit].allowed) <= losses.get(unit, {}).keys():
            raise UserError(f"the sensitivity scores lack {unit}: they are another model's")
    bits = assign(graph, budget, losses)
    _begin(model, learning, bits, lambda: bits)


def start_at_profile(
    model: nn.Module, budget: Budget, profile: Mapping[str, float], learning: bool = True
) -> None:
    """Shift a profile of bit-widths onto the budget and let every tensor start there.

    Args:
        model: prepared.
        budget: what the widths cost.
        profile: bit-widths by unit (see `units_of`); pinned tensors keep their own.
        learning: whether widths are learned from there; else they are fixed at the allowed ones
            that keep the budget and are nearest, by the sum of squares.
    """
    graph = quant_state(model).graph
    units = units_of(graph)
    base = {
        name: float(profile.get(unit, graph.tensors[name].allowed[0]))
        for unit, members in units.items()
        for name in members
    }
    bits = bits_at_budget(graph, budget, base)
    distances = {
        unit: {width: (width - bits[unit]) ** 2 for width in graph.tensors[unit].allowed}
        for unit in units
    }
    _begin(model, learning, bits, lambda: assign(graph, budget, distances))


def stop_learning_bits(model: nn.Module) -> None:
    """Let no bit-width of a prepared model learn; `start_at` still moves them."""
    for quantizer in quantizers(model).values():
        bits = quantizer.bits
        if bits.learned:
            fixed = BitWidth(bits.allowed, bits.start, learned=False, key=bits.key)
            quantizer.replace_bits(fixed.to(bits.marginal))


def start_at_one_width(model: nn.Module, budget: Budget) -> None:
    """Give every tensor the largest single bit-width that keeps the budget.

    Raises:
        UserError: there is none.
    """
    graph = quant_state(model).graph
    free = [set(t.allowed) for t in graph.tensors.values() if len(t.allowed) > 1]
    shared = sorted(set.intersection(*free)) if free else [0]
    fitting = [w for w in shared if usage(graph, uniform_bits(graph, w), budget) <= 1]
    if not fitting:
        raise UserError(
            f"train.start: no single bit-width of {shared} keeps the budget; raise it, or let "
            "bit-widths differ"
        )
    for name, bits in uniform_bits(graph, fitting[-1]).items():
        quantizers(model)[name].start_at(bits)


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
        if key.endswith(".bits.marginal"):
            return False  # so that a child without a noise phase has something to project by
        return ".bits." in key or key.endswith("_extra_state")

    model.load_state_dict({k: fresh[k] if own(k) else state.get(k, v) for k, v in fresh.items()})
    return bits
