"""How a model is quantized: frozen, checked, and plain enough to stand in a sweep file."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nipq_search.errors import UserError, nearest
from nipq_search.quant.quantizers.base import QUANTIZERS
from nipq_search.quant.quantizers.bit_width import check_bits

FLOAT = "float"
"""The pin that leaves a layer in floating point."""


class Granularity(enum.StrEnum):
    """How many truncation boundaries a weight tensor has."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"


class ActivationStart(enum.StrEnum):
    """Starting value of an activation's truncation boundary."""

    PERCENTILE = "percentile"
    MSE = "mse"


class Start(enum.StrEnum):
    """Starting value of a weight's truncation boundary."""

    ABSMAX = "absmax"
    MSE = "mse"


class Proxy(enum.StrEnum):
    """Law of the pseudo-quantization noise."""

    UNIFORM = "uniform"
    EMPIRICAL = "empirical"


def _choice(kind: type[enum.StrEnum], value: str, key: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{key}: unknown value {value!r}{nearest(str(value), kind)}") from None


@dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """How weights are quantized.

    Attributes:
        bits: allowed bit-widths, each 2..16; gaps are fine.
        granularity: one boundary per output channel, or one per tensor.
        start: boundaries start at the absolute maximum, or where the mean squared error of
            4-bit rounding is least.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    granularity: Granularity = Granularity.PER_CHANNEL
    start: Start = Start.ABSMAX

    def __post_init__(self) -> None:
        """Check every field; raise `UserError`."""
        object.__setattr__(self, "bits", check_bits(self.bits, "quant.weights.bits"))
        if self.bits[0] < 2:
            raise UserError("quant.weights.bits: weights are signed and need at least 2 bits")
        key = "quant.weights"
        object.__setattr__(
            self, "granularity", _choice(Granularity, self.granularity, f"{key}.granularity")
        )
        object.__setattr__(self, "start", _choice(Start, self.start, f"{key}.start"))


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """How activations are quantized; each tensor has one boundary.

    Attributes:
        bits: allowed bit-widths, each 1..16. Where 1 is allowed, a tensor with both signs gets
            an affine grid, since a signed grid needs two bits.
        percentile: share of the calibrated values that lies inside the starting boundary.
        start: boundaries start at that percentile, or inside of it where the mean squared error
            of 4-bit rounding is least.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    percentile: float = 0.999
    start: ActivationStart = ActivationStart.PERCENTILE

    def __post_init__(self) -> None:
        """Check every field; raise `UserError`."""
        object.__setattr__(self, "bits", check_bits(self.bits, "quant.activations.bits"))
        if not 0.5 < self.percentile <= 1.0:
            raise UserError("quant.activations.percentile: must be above 0.5 and at most 1")
        object.__setattr__(
            self, "start", _choice(ActivationStart, self.start, "quant.activations.start")
        )


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How a model is quantized.

    Attributes:
        quantizer: `nipq` or `lsq`.
        weights: how weights are quantized.
        activations: how the inputs of layers are quantized.
        pin: pattern of layers to a fixed bit-width, or to `float`. It holds for the layer's
            weight and for what it consumes; the first pattern that matches counts. A pattern is
            one of names (as in `fnmatch`), `kind:` and one of kinds, `order:first` or
            `order:last`.
        exclude: patterns of layers that stay in float.
        include: patterns of the only layers that are quantized; empty for all.
        products: whether products of two activations, as in attention, are quantized.
        residuals: whether residual sums are quantized: both terms with one quantizer.
        groups: tensors that share one bit-width: `qkv` (projections that one attention
            multiplies and that consume one tensor), `residual` (sums along one residual
            stream), a pattern of layers, or a list of such patterns.
        proxy: law of the noise that NIPQ trains with.
        start_bits: bit-width at the start, clipped to [5 %, 95 %] of the allowed span.
        input_bits: 8 where the model's raw input is uint8 data, which then stays as it is and
            counts 8 bits; None quantizes it like any other tensor.
        seed: seed of the noise.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    quantizer: str = "nipq"
    weights: WeightConfig = field(default_factory=WeightConfig)
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    pin: Mapping[str, int | str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    products: bool = True
    residuals: bool = False
    groups: tuple[str | tuple[str, ...], ...] = ()
    proxy: Proxy = Proxy.UNIFORM
    start_bits: float = 8.0
    input_bits: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field; raise `UserError`."""
        QUANTIZERS.lookup(self.quantizer, "quant.quantizer")
        object.__setattr__(self, "proxy", _choice(Proxy, self.proxy, "quant.proxy"))
        if not 1.0 <= self.start_bits <= 16.0:
            raise UserError("quant.start_bits: must be between 1 and 16")
        for name in ("exclude", "include", "groups"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"quant.{name}: give a list of patterns, such as ['head*']")
        if "residual" in self.groups and not self.residuals:
            raise UserError(
                "quant.groups: residual sums are not quantized; add `residuals: true` to quant"
            )
        if self.input_bits is not None:
            check_bits((self.input_bits,), "quant.input_bits")
        for pattern, bits in self.pin.items():
            if bits == FLOAT:
                continue
            if not isinstance(bits, int):
                raise UserError(f"quant.pin.{pattern}: give a bit-width or `float`, not {bits!r}")
            check_bits((bits,), f"quant.pin.{pattern}")
            if bits < 2:
                raise UserError(f"quant.pin.{pattern}: weights need at least 2 bits")
