"""What a traced call is: a layer with a weight, a product of activations, a residual sum."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from torch import Tensor

from nipq_search.quant.tracing.trace import Call, Operand, Trace

UNTRAINED = "the table is not trained"
IDLE = "did not run on the example inputs"

FIRST, SECOND = "input", "second"
"""Slots of the activations that a layer consumes; they end the names of tensors."""


@dataclass
class Layer:
    """A call that becomes a layer of the graph.

    Attributes:
        call: what was traced.
        name: name of the layer.
        kind: its kind.
        weight: the operand that is a weight, or None.
        slots: the operands that are activations.
        why: why nothing of it is quantized; empty where it is.
        asked: whether the configuration asked for that.
        pin: bit-width, `float` or None.
    """

    call: Call
    name: str
    kind: str
    weight: int | None = None
    slots: dict[str, int] = field(default_factory=dict)
    why: str = ""
    asked: bool = False
    pin: int | str | None = None

    @property
    def in_float(self) -> bool:
        """Whether no operand gets a quantizer."""
        return bool(self.why)

    def operands(self, index: int) -> list[Operand]:
        """One operand of every time that the call was made."""
        found = (pair[index] for pair in self.call.operands)
        return [operand for operand in found if operand is not None]


def find_layers(found: Trace, products: bool) -> list[Layer]:
    """The layers of a trace, named, in order of execution; sums are left out.

    Args:
        found: the trace.
        products: whether products of two activations are to be quantized.
    """
    layers: list[Layer] = []
    taken: set[str] = set()
    for call in found.calls:
        if call.op is not None and call.op.is_sum:
            continue
        layer = Layer(call, "", call.op.kind if call.op else call.function)
        if not _assign(layer, products):
            continue
        layer.name = _name(layer, taken)
        taken.add(layer.name)
        layers.append(layer)
    return layers


def _assign(layer: Layer, products: bool) -> bool:
    """Say which operand is what, or why the layer stays in float; False if it is none at all."""
    call = layer.call
    first, second = call.operands[0]
    if call.op is not None and call.op.is_lookup:
        layer.weight = 1
        if second is None or not second.is_weight:
            return False
        layer.why = "" if second.trained else UNTRAINED
        return True
    if not call.macs and not call.label:
        return False
    if call.op is None:
        layer.why = f"{call.function} has no quantized form"
    elif first is None or second is None:
        layer.why = "an operand is no tensor of floating-point numbers"
    elif second.is_weight and (not first.is_weight or _goes_through(call, first, second)):
        layer.weight, layer.slots = 1, {FIRST: 0}
    elif first.is_weight and not second.is_weight:
        layer.weight, layer.slots = 0, {FIRST: 1}
    elif first.is_activation and second.is_activation:
        layer.slots = {FIRST: 0, SECOND: 1}
        if not products:
            layer.why, layer.asked = "products of activations are left out by quant.products", True
    elif first.is_weight:
        layer.why = "both operands are computed from parameters alone"
    else:
        layer.why = "an operand is a constant"
    return True


def _goes_through(call: Call, first: Operand, second: Operand) -> bool:
    """Whether of two operands made of parameters the second is the weight of the first."""
    assert call.op is not None and call.op.first is not None
    is_layer = call.op.first.axis is None and call.op.second.axis is not None
    return second.parameter is not None and (is_layer or first.parameter is None)


def _name(layer: Layer, taken: set[str]) -> str:
    call = layer.call
    operand = None if layer.weight is None else call.operands[0][layer.weight]
    if operand is not None and operand.parameter is not None:
        name = operand.parameter.removesuffix("weight").rstrip("._")
        if name not in taken and (name or not call.owner):
            return name
    if operand is not None and call.owner not in taken:
        return call.owner
    base = ".".join(part for part in (call.owner, layer.kind) if part)
    names = itertools.chain([base], (f"{base}_{n}" for n in itertools.count(1)))
    return next(name for name in names if name not in taken)


def find_sums(found: Trace) -> dict[str, Call]:
    """The residual sums of a trace, by name."""
    sums: dict[str, Call] = {}
    for call in found.calls:
        if call.op is not None and call.op.is_sum and _is_residual(call):
            base = ".".join(part for part in (call.owner, "add") if part)
            names = itertools.chain([base], (f"{base}_{n}" for n in itertools.count(1)))
            sums[next(name for name in names if name not in sums)] = call
    return sums


def _is_residual(call: Call) -> bool:
    """Whether a sum adds two activations of equal shape."""
    first, second = call.operands[0]
    return (
        first is not None
        and second is not None
        and first.shape == second.shape
        and len(first.shape) > 1
        and first.is_activation
        and second.is_activation
        and first.origins != second.origins  # else a part of an activation function, as in GELU
    )


def weight_value(layer: Layer) -> Tensor:
    """The weight of a layer that has one."""
    assert layer.weight is not None
    value = layer.operands(layer.weight)[0].value
    assert value is not None
    return value


def weight_axis(layer: Layer) -> int | None:
    """Dimension of the output channels in a layer's weight."""
    op = layer.call.op
    assert op is not None
    place = op.second if layer.weight == 1 else op.first
    axis = place.axis if place is not None else None
    value = weight_value(layer)
    return None if axis is None or value.dim() < 2 else axis % value.dim()


def stored_elements(value: Tensor) -> int:
    """Elements of a weight as it is stored: an expanded one is not stored more than once."""
    sizes = zip(value.shape, value.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride != 0)
