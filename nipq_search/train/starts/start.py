"""Starting bit-widths: from the budget, scores, a profile, a finished trial or a single width."""

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
"""Number of bisection steps, starting from an interval of 48 bits."""


def bits_at_budget(
    graph: Graph, budget: Budget, base: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return fractional bit-widths whose cost equals the budget: `base` plus one shift for all.

    Without `base`, tensors that contribute to no budgeted cost, such as an embedding under a
    BOPs budget, take their largest width.

    Args:
        graph: the model's layers and tensors.
        budget: the targets. The binding one is met exactly, unless no shift within the allowed
            ranges reaches it.
        base: bit-widths by tensor; None starts from equal widths.

    Returns:
        Fractional bit-widths by tensor, within the allowed ranges.
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

    # Compare terms, not costs: a cost that is the maximum of its terms may hide a change in one.
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
    """Start learned widths at `bits`; if widths are not learned, freeze them at `fixed()`."""
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
    """Initialize the bit-widths so that the cost meets the budget; see `bits_at_budget`.

    A short noise phase that started from 8 bits would mostly be spent on reducing the bit-widths.

    Args:
        model: a prepared model.
        budget: the targets.
        base: bit-widths by tensor, all shifted by the same amount to meet the budget; None
            starts from equal widths.
        learning: whether widths are learned; otherwise they are projected to allowed widths
            within the budget and frozen.

    Raises:
        UserError: widths are not learned, and the budget cannot be reached.
    """
    graph, found = quant_state(model).graph, quantizers(model)
    bits = bits_at_budget(graph, budget, base)
    marginal = {name: float(quantizer.bits.marginal) for name, quantizer in found.items()}
    _begin(model, learning, bits, lambda: project(graph, budget, bits, marginal))


def stay_at_parent(
    model: nn.Module, budget: Budget, bits: Mapping[str, float], learning: bool = True
) -> bool:
    """Start at a parent's bit-widths if they meet the budget and use at least `MIN_USAGE` of it.

    Args:
        model: a prepared model.
        budget: the targets.
        bits: the parent's bit-widths by tensor.
        learning: whether widths are learned; otherwise they are frozen.

    Returns:
        Whether the widths fit; if not, the model is unchanged.
    """
    fixed = {name: round(width) for name, width in bits.items()}
    if not MIN_USAGE <= usage(quant_state(model).graph, fixed, budget) <= 1:
        return False
    _begin(model, learning, bits, lambda: fixed)
    return True


def start_at_scores(
    model: nn.Module, budget: Budget, losses: Losses, learning: bool = True
) -> None:
    """Start at the bit-widths with the least measured loss within the budget.

    Args:
        model: a prepared model.
        budget: the targets.
        losses: scores by unit (see `units_of`) and allowed width; see `sensitivities`.
        learning: whether widths are learned; otherwise they are frozen.

    Raises:
        UserError: the scores were measured on a different model, or the budget cannot be reached.
    """
    graph = quant_state(model).graph
    for unit in units_of(graph):
        if not set(graph.tensors[unit].allowed) <= losses.get(unit, {}).keys():
            raise UserError(
                f"the sensitivity scores do not cover {unit}: they belong to a different model"
            )
    bits = assign(graph, budget, losses)
    _begin(model, learning, bits, lambda: bits)


def start_at_profile(
    model: nn.Module, budget: Budget, profile: Mapping[str, float], learning: bool = True
) -> None:
    """Start at `profile` plus the constant shift that makes the cost equal the budget.

    Args:
        model: a prepared model.
        budget: the targets.
        profile: bit-widths by unit (see `units_of`); missing units start from their smallest
            allowed width, and pinned tensors keep their own width.
        learning: whether widths are learned; otherwise they are frozen at the assignment within
            the budget that is closest to the shifted profile in squared distance.

    Raises:
        UserError: widths are not learned, and the budget cannot be reached.
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
    """Make all bit-widths of a prepared model constant; `start_at` can still change them."""
    for quantizer in quantizers(model).values():
        bits = quantizer.bits
        if bits.learned:
            fixed = BitWidth(bits.allowed, bits.start, learned=False, key=bits.key)
            quantizer.replace_bits(fixed.to(bits.marginal))


def start_at_one_width(model: nn.Module, budget: Budget) -> None:
    """Set every searched tensor to the largest single bit-width within the budget.

    Tensors with only one allowed width keep it.

    Raises:
        UserError: no single width is within the budget.
    """
    graph = quant_state(model).graph
    allowed_sets = [set(t.allowed) for t in graph.tensors.values() if len(t.allowed) > 1]
    shared = sorted(set.intersection(*allowed_sets)) if allowed_sets else [0]
    fitting = [w for w in shared if usage(graph, uniform_bits(graph, w), budget) <= 1]
    if not fitting:
        raise UserError(
            f"train.start: no single bit-width of {shared} meets the budget; raise the budget, or "
            "choose a start other than uniform"
        )
    for name, bits in uniform_bits(graph, fitting[-1]).items():
        quantizers(model)[name].start_at(bits)


def warm_start(model: nn.Module, state: Mapping[str, Any]) -> dict[str, float]:
    """Load a finished trial's weights, boundaries, normalization statistics and bit-widths.

    The model is changed in place. Its bit-widths can still be learned, and it keeps its own seed
    for the noise.

    Args:
        model: a prepared, untrained model.
        state: state dict of a frozen model with the same architecture and quantizer.

    Returns:
        The finished trial's bit-widths by tensor.

    Raises:
        RuntimeError: the state does not match the model.
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
            return False  # inherited, since without a noise phase the projection depends on it
        return ".bits." in key or key.endswith("_extra_state")

    model.load_state_dict({k: fresh[k] if own(k) else state.get(k, v) for k, v in fresh.items()})
    return bits
