"""Layers and tensors of a prepared model as plain data, from which the costs are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nipq_search.quant.quantizers.base import TensorRole

FLOAT_BITS = 32
"""Bit-width, in bits, at which an operand that stays in floating point is counted."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A weight, an activation that layers consume, or a residual sum.

    Attributes:
        name: `<layer>.weight` for a weight, `<first consuming layer>.input` for an activation,
            `<first consuming layer>.second` for the second operand of a product of two
            activations, and `<module>.add` or `<module>.add_<n>` for a residual sum.
        role: weight, activation or addition (a residual sum).
        numel: number of elements; per sample unless the tensor is a weight.
        scales: number of float scales to store with the tensor.
        allowed: allowed bit-widths in bits, ascending: a single one if the tensor is pinned, none
            if it has no quantizer.
        group: name of the group whose tensors share one bit-width, or None.
        fixed_bits: bit-width at which a tensor without a quantizer is counted: 32 in float, or
            `QuantConfig.input_bits` for raw input. None for a quantized tensor.
    """

    name: str
    role: TensorRole
    numel: int
    scales: int = 0
    allowed: tuple[int, ...] = ()
    group: str | None = None
    fixed_bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """A layer, which multiplies tensors or looks up rows of a weight.

    Attributes:
        name: qualified name of the module, or of the site within it.
        kind: `conv2d`, `linear`, `scores` and so on.
        macs: multiply-accumulates per sample.
        weight: name of the weight tensor, or None.
        input: name of the input tensor, or None.
        second: name of the second activation in a product of two activations, or None.
        float_reason: reason why the layer stays in floating point; empty if it is quantized.
        float_requested: whether `float_reason` follows from the configuration.
    """

    name: str
    kind: str
    macs: int
    weight: str | None
    input: str | None
    second: str | None = None
    float_reason: str = ""
    float_requested: bool = False


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Layers and tensors of a prepared model.

    Attributes:
        layers: all layers, in order of execution, followed by those that did not run and by
            `(unconverted)` if some multiplications belong to no layer.
        tensors: all tensors by name.
        float_parameters: number of elements of all parameters that are not part of a weight in
            `tensors`, such as biases; they stay in float. Excludes quantizer scales.
    """

    layers: tuple[LayerInfo, ...]
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    float_parameters: int = 0
