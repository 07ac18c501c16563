"""Quantization settings: frozen, validated dataclasses for the `quant` section of a sweep file."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nipq_search.errors import UserError, nearest
from nipq_search.quant.quantizers.base import QUANTIZERS
from nipq_search.quant.quantizers.bit_width import check_bits

FLOAT = "float"
"""Pin value that keeps a layer in floating point."""


class Granularity(enum.StrEnum):
    """Number of truncation boundaries of a weight tensor: one, or one per output channel."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"


class ActivationStart(enum.StrEnum):
    """Calibration method for the initial truncation boundary of an activation."""

    PERCENTILE = "percentile"
    MSE = "mse"


class Start(enum.StrEnum):
    """Method that determines the initial truncation boundary of a weight."""

    ABSMAX = "absmax"
    MSE = "mse"


class Proxy(enum.StrEnum):
    """Distribution of the pseudo-quantization noise."""

    UNIFORM = "uniform"
    EMPIRICAL = "empirical"


def _choice(kind: type[enum.StrEnum], value: str, key: str) -> Any:
    """Convert the value of the setting `key` to its enum."""
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{key}: unknown value {value!r}{nearest(str(value), kind)}") from None


@dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """Settings for weight quantization.

    Attributes:
        bits: allowed bit-widths in bits, each from 2 to 16; gaps are permitted.
        granularity: one truncation boundary per output channel, or one per tensor.
        start: initial boundary: `absmax` for the absolute maximum, or `mse` for the boundary at or
            below the maximum that minimizes the mean squared error of 4-bit rounding.

    Example:
        >>> from nipq_search import WeightConfig
        >>> WeightConfig(bits=(8, 2, 4)).bits
        (2, 4, 8)
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    granularity: Granularity = Granularity.PER_CHANNEL
    start: Start = Start.ABSMAX

    def __post_init__(self) -> None:
        """Validate and normalize every field.

        Raises:
            UserError: a bit-width, `granularity` or `start` is invalid.
        """
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
    """Settings for activation quantization; each tensor has one truncation boundary.

    Attributes:
        bits: allowed bit-widths in bits, each from 1 to 16. If 1 is allowed, tensors with values
            of both signs use an affine grid, because a signed grid needs at least two bits.
        percentile: fraction of the calibration values inside the initial boundary, above 0.5 and
            at most 1.
        start: initial boundary: `percentile`, or `mse` for the boundary at or below the percentile
            that minimizes the mean squared error of 4-bit rounding.

    Example:
        >>> from nipq_search import ActivationConfig
        >>> ActivationConfig(bits=(4, 8), percentile=0.9999).start.value
        'percentile'
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    percentile: float = 0.999
    start: ActivationStart = ActivationStart.PERCENTILE

    def __post_init__(self) -> None:
        """Validate and normalize every field.

        Raises:
            UserError: a bit-width, `percentile` or `start` is invalid.
        """
        object.__setattr__(self, "bits", check_bits(self.bits, "quant.activations.bits"))
        if not 0.5 < self.percentile <= 1.0:
            raise UserError("quant.activations.percentile: must be above 0.5 and at most 1")
        object.__setattr__(
            self, "start", _choice(ActivationStart, self.start, "quant.activations.start")
        )


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Settings for the quantization of a whole model.

    Attributes:
        quantizer: name of a registered quantizer, such as `nipq`, `lsq` or `diffq`.
        weights: settings for weights.
        activations: settings for the inputs of layers.
        pin: maps layer patterns to a fixed bit-width or to `float`. A pin applies to the layer's
            weight and to its inputs; the first matching pattern wins. A pattern is a layer name
            with `fnmatch` wildcards, `kind:` followed by a layer kind, `order:first` or
            `order:last`.
        exclude: patterns of layers that stay in float.
        include: if not empty, only layers that match one of these patterns are quantized.
        products: whether to quantize products of two activations, as in attention.
        residuals: whether to quantize residual sums; one quantizer serves both terms.
        groups: sets of tensors that share one bit-width. Each entry is `qkv` (projections of the
            same tensor within one attention module), `residual` (sums along one residual stream),
            a layer pattern, or a list of layer patterns.
        proxy: distribution of the pseudo-quantization noise of `nipq`.
        start_bits: initial bit-width in bits, from 1 to 16. Learned bit-widths are clipped to
            between 5 % and 95 % of the way from the smallest to the largest allowed one; others
            start at the nearest allowed one.
        input_bits: bit-width of the model's raw input, for example 8 for uint8 data; the input is
            then passed through unchanged and counted at this width. If None, the input is
            quantized like any other tensor.
        seed: seed of the pseudo-quantization noise.

    Example:
        >>> from nipq_search import QuantConfig, WeightConfig
        >>> config = QuantConfig(weights=WeightConfig(bits=(2, 4, 8)), pin={"order:first": 8})
        >>> config.quantizer
        'nipq'
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
        """Validate and normalize every field.

        Raises:
            UserError: a field is invalid or contradicts another; the message names its key.
        """
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
