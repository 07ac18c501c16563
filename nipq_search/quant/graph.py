"""What `prepare` found in a model: its layers and tensors, as plain data for the costs."""

from __future__ import annotations

from dataclasses import dataclass, field

FLOAT_BITS = 32
"""Bit-width of an operand that is left in floating point."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor that has a bit-width.

    Attributes:
        name: `<layer>.weight`, or `<first layer that consumes it>.input`, or `.second` for the
            second operand of a product of two activations.
        role: `weight`, `activation` or `addition` (a residual sum).
        numel: elements; of an activation those of one sample.
        scales: float scales that it needs.
        allowed: allowed bit-widths; one where it is pinned.
        group: name of the group whose tensors all have one bit-width, or None.
        fixed_bits: its width where it has no quantizer: 32 in float, 8 for raw uint8 input.
    """

    name: str
    role: str
    numel: int
    scales: int = 0
    allowed: tuple[int, ...] = ()
    group: str | None = None
    fixed_bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """A layer that multiplies, or looks up rows of a weight.

    Attributes:
        name: qualified name of the module, or of the site in it.
        kind: `conv2d`, `linear`, `scores`, ...
        macs: multiply-accumulates per sample.
        weight: name of its weight tensor, or None.
        input: name of the tensor that it consumes, or None.
        second: name of the other activation, in a product of two activations.
        why: why it, or an operand, stays in floating point; empty where it does not.
        asked: whether the configuration asked for that.
    """

    name: str
    kind: str
    macs: int
    weight: str | None
    input: str | None
    second: str | None = None
    why: str = ""
    asked: bool = False


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Layers and tensors of a prepared model.

    Attributes:
        layers: every layer, in order of execution.
        tensors: every tensor, by name.
        float_parameters: parameters that stay in float, scales excluded.
    """

    layers: tuple[LayerInfo, ...]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    float_parameters: int = 0
