"""Classification of traced calls: layers with a weight, products of activations, residual sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from nipq_search.quant.tracing.trace import Call, OperandRecord, Trace

UNTRAINED = "the table is not trainable"
IDLE = "did not run on the example inputs"

FIRST, SECOND = "input", "second"
"""Slots of the activations that a layer consumes; also the suffixes of their tensor names."""


class Roles(NamedTuple):
    """Roles of the operands of a call; see `Layer`."""

    weight: int | None = None
    slots: Mapping[str, int] = MappingProxyType({})
    float_reason: str = ""
    float_requested: bool = False


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A traced call that becomes a layer of the graph.

    Attributes:
        call: the traced call.
        name: name of the layer.
        kind: `conv2d`, `linear`, `scores` and so on.
        weight: index of the operand that is a weight, or None.
        slots: indices of the operands that are activations, by slot.
        float_reason: reason why the layer stays in float; empty if it is quantized.
        float_requested: whether `float_reason` follows from the configuration.
        pin: bit-width in bits, `float` or None.
    """

    call: Call
    name: str
    kind: str
    weight: int | None
    slots: Mapping[str, int]
    float_reason: str
    float_requested: bool
    pin: int | str | None = None

    @property
    def in_float(self) -> bool:
        """Whether the layer stays in float, so that none of its operands is quantized."""
        return bool(self.float_reason)

    def operands(self, index: int) -> list[OperandRecord]:
        """Return the operand at `index` of every execution of the call."""
        found = (pair[index] for pair in self.call.operands)
        return [operand for operand in found if operand is not None]


def find_layers(found: Trace, products: bool) -> list[Layer]:
    """Return the named layers of a trace in order of execution, without sums.

    Args:
        found: the trace.
        products: whether to quantize products of two activations.

    Returns:
        The layers, including those that stay in float; none is pinned yet.
    """
    layers: list[Layer] = []
    taken: set[str] = set()
    for call in found.calls:
        if call.op is not None and call.op.is_sum:
            continue
        roles = roles_of(call, products)
        if roles is None:
            continue
        kind = call.op.kind if call.op else call.function
        name = _name(call, kind, roles.weight, taken)
        taken.add(name)
        layers.append(Layer(call=call, name=name, kind=kind, **roles._asdict()))
    return layers


def roles_of(call: Call, products: bool) -> Roles | None:
    """Return the roles of the operands of a call, or None if it is not a layer.

    Args:
        call: a call that is not a sum.
        products: whether to quantize products of two activations.

    Returns:
        The roles. A reason is given if the call stays in float.
    """
    first, second = call.operands[0]
    if call.op is not None and call.op.is_lookup:
        if second is None or not second.is_weight:
            return None
        return Roles(weight=1, float_reason="" if second.trained else UNTRAINED)
    if not call.macs and not call.label:
        return None
    if call.op is None:
        return Roles(float_reason=f"{call.function} has no quantized form")
    if first is None or second is None:
        return Roles(float_reason="an operand is not a floating-point tensor")
    if second.is_weight and (not first.is_weight or _second_is_weight(call, first, second)):
        return Roles(weight=1, slots={FIRST: 0})
    if first.is_weight and not second.is_weight:
        return Roles(weight=0, slots={FIRST: 1})
    if first.is_activation and second.is_activation:
        slots = {FIRST: 0, SECOND: 1}
        if products:
            return Roles(slots=slots)
        reason = "products of activations are disabled by quant.products"
        return Roles(slots=slots, float_reason=reason, float_requested=True)
    if first.is_weight:
        return Roles(float_reason="both operands are computed from parameters only")
    return Roles(float_reason="an operand is a constant")


def _second_is_weight(call: Call, first: OperandRecord, second: OperandRecord) -> bool:
    """Whether the second of two operands computed from parameters is the weight of a layer."""
    assert call.op is not None and call.op.first is not None
    is_layer = call.op.first.axis is None and call.op.second.axis is not None
    return second.parameter is not None and (is_layer or first.parameter is None)


def _name(call: Call, kind: str, weight: int | None, taken: set[str]) -> str:
    """Return an unused name for a layer, derived from its weight, its owner or the call."""
    operand = None if weight is None else call.operands[0][weight]
    if operand is not None and operand.parameter is not None:
        name = operand.parameter.removesuffix("weight").rstrip("._")
        if name not in taken and (name or not call.owner):
            return name
    if operand is not None and call.owner not in taken:
        return call.owner
    base = ".".join(part for part in (call.owner, kind) if part)
    names = itertools.chain([base], (f"{base}_{n}" for n in itertools.count(1)))
    return next(name for name in names if name not in taken)


def find_sums(found: Trace) -> dict[str, Call]:
    """Return the residual sums of a trace by name."""
    sums: dict[str, Call] = {}
    for call in found.calls:
        if call.op is not None and call.op.is_sum and _is_residual(call):
            base = ".".join(part for part in (call.owner, "add") if part)
            names = itertools.chain([base], (f"{base}_{n}" for n in itertools.count(1)))
            sums[next(name for name in names if name not in sums)] = call
    return sums


def _is_residual(call: Call) -> bool:
    """Whether a sum adds two activations of equal shape from different origins.

    Sums of vectors and scalars do not count.
    """
    first, second = call.operands[0]
    return (
        first is not None
        and second is not None
        and first.shape == second.shape
        and len(first.shape) > 1
        and first.is_activation
        and second.is_activation
        and first.origins != second.origins  # equal ones occur in activation functions, as in GELU
    )


def weight_value(layer: Layer) -> Tensor:
    """Return the weight of a layer that has one."""
    assert layer.weight is not None
    value = layer.operands(layer.weight)[0].value
    assert value is not None
    return value


def weight_axis(layer: Layer) -> int | None:
    """Return the output-channel dimension of the weight of a layer that has one.

    Returns:
        The non-negative index of the dimension. None if the operation declares no such dimension,
        or if the weight has fewer than two dimensions.
    """
    op = layer.call.op
    assert op is not None
    spec = op.second if layer.weight == 1 else op.first
    dimensions = weight_value(layer).dim()
    if spec is None or spec.axis is None or dimensions < 2:
        return None
    return spec.axis % dimensions


def stored_elements(value: Tensor) -> int:
    """Return the number of elements of a weight in memory; expanded dimensions count as size 1."""
    sizes = zip(value.shape, value.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride != 0)
