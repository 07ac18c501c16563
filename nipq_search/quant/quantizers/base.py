"""Base class and registry of fake quantizers.

Life cycle of a quantizer: `prepare` constructs it; activation quantizers observe calibration
batches; `initialize` sets the grid and the range from calibration statistics; the quantizer is
trained; `freeze` fixes its bit-width; training with hard quantization and evaluation follow.

To add a quantizer, write one file like `nipq.py` and register the class in
`nipq_search/quant/__init__.py`. Other packages instead declare an entry point in the group of the
`QUANTIZERS` registry (see docs/extending.md).
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nipq_search.quant.kernels import hard_quantize
from nipq_search.quant.numerics.functional import GRID_CODES, Boundary, Grid
from nipq_search.quant.numerics.noise import NoiseClock, with_origin
from nipq_search.quant.quantizers.bit_width import BitWidth
from nipq_search.quant.quantizers.statistics import TensorStatistics
from nipq_search.registry import Registry


class TensorRole(enum.StrEnum):
    """Role of a tensor in a model."""

    WEIGHT = "weight"
    ACTIVATION = "activation"
    ADDITION = "addition"


class Placement(NamedTuple):
    """Assignment of boundaries to the elements of a tensor `x`.

    Attributes:
        axis: channel dimension.
        rows: channel index of each row, shape (len(x),), if `x` contains rows looked up in a
            weight; otherwise None.
    """

    axis: int = 0
    rows: Tensor | None = None


class FakeQuantizer(nn.Module, abc.ABC):
    """Simulates quantization of one tensor in floating point. Subclasses define the boundary.

    While `observer` is set, as during calibration, the quantizer passes tensors to it (with the
    channel dimension first if there are several channels) and returns them unchanged. Rows looked
    up in a weight are not observed.

    Args:
        name: name of the tensor, for example `conv1.weight` or `conv1.input`.
        bits: bit-width of the tensor.
        channels: number of boundaries: 1, or the number of output channels of a weight.
        clock: noise clock of the model.
        key: index of the tensor in the model; part of the key that determines its noise.
        proxy: distribution of the noise; ignored by quantizers that offer no choice.
        role: role of the tensor in the model.
    """

    learns_bits = True
    """Whether the bit-width is learned by gradient descent."""

    learns_boundary = True
    """Whether the boundary is computed from a learned parameter."""

    free_start = True
    """Whether the initial boundary may be chosen freely; false if the method prescribes it."""

    rounds_once_frozen = True
    """Whether values are rounded in training once the bit-width is frozen. If false, training
    continues as before, for example with noise. Values are always rounded in evaluation."""

    scales_gradient = False
    """Whether the gradient through `alpha` depends on the number of elements per boundary."""

    minimum: Tensor
    grid_code: Tensor

    def __init__(
        self,
        name: str,
        bits: BitWidth,
        channels: int,
        clock: NoiseClock,
        key: int,
        proxy: str,
        role: TensorRole = TensorRole.ACTIVATION,
    ) -> None:
        """Create a quantizer with default values; `initialize` sets the calibrated ones."""
        super().__init__()
        self.name, self.channels, self.key, self.proxy = name, channels, key, proxy
        self.bits = bits
        self.clock = clock
        self.role = role
        self.observer: Callable[[Tensor], None] | None = None
        self.register_buffer("minimum", torch.zeros(1))
        self.register_buffer("grid_code", torch.zeros(1, dtype=torch.int64))
        self.grid = Grid.SIGNED

    @property
    def is_weight(self) -> bool:
        """Whether the tensor is a weight."""
        return self.role is TensorRole.WEIGHT

    def initialize(self, statistics: TensorStatistics) -> None:
        """Set the grid, the minimum and the boundary from calibration statistics."""
        self.grid = statistics.grid
        with torch.no_grad():
            self.grid_code.fill_(GRID_CODES.index(statistics.grid))
            self.minimum.copy_(statistics.minimum)
            self.set_boundary(statistics)

    @abc.abstractmethod
    def set_boundary(self, statistics: TensorStatistics) -> None:
        """Set the boundary to its initial value, given calibration statistics."""

    @abc.abstractmethod
    def alpha(self, elements_per_boundary: float = 1.0) -> Tensor:
        """Return the truncation boundary, shape (channels,), with the gradient used in training.

        Its values are at least `functional.MIN_BOUNDARY`.

        Args:
            elements_per_boundary: number of elements per boundary; per sample for activations.
        """

    @abc.abstractmethod
    def scale_range(self, factor: Tensor) -> None:
        """Multiply the quantization range by factors of shape (1,) or (channels,).

        Has no effect if the range is determined by the data.
        """

    def train_forward(self, x: Tensor, place: Placement) -> Tensor:
        """Quantize `x` as in training before the bit-width is frozen; by default, by rounding.

        This method is also called after freezing if `rounds_once_frozen` is false.
        """
        return hard_quantize(x, self.boundary_for(x, place))

    def boundary_for(
        self, x: Tensor, place: Placement | None = None, bits: Tensor | None = None
    ) -> Boundary:
        """Return the parameters of the quantization range of `x`.

        Args:
            x: the tensor to quantize.
            place: assignment of boundaries to elements; default: channels along dimension 0.
            bits: bit-width, shape (1,); default: the hard bit-width.

        Returns:
            The boundary, in float32 or float64.
        """
        place = place or Placement()
        elements_per_boundary = (
            self._elements_per_boundary(x, place)
            if self.scales_gradient and self.training
            else 1.0
        )
        alpha = self.alpha(elements_per_boundary)
        if alpha.dtype in (torch.bfloat16, torch.float16):
            alpha = alpha.float()  # half precision cannot represent grids above 8 bits
        if self.channels > 1 and place.rows is not None:
            alpha = alpha[place.rows]
        if bits is None:
            bits = alpha.new_full((1,), self.bits.hard())
        return Boundary(alpha, bits.to(alpha.dtype), self.grid, self.minimum, place.axis)

    def _elements_per_boundary(self, x: Tensor, place: Placement) -> float:
        if not self.is_weight:
            boundaries = len(x)
        elif place.rows is not None:
            if self.channels == 1:
                return max(1.0, x.numel() * self.clock.batch_ratio())
            boundaries = len(x)
        else:
            boundaries = self.channels
        return max(1.0, x.numel() / max(1, boundaries))

    def noise_key(self, x: Tensor, place: Placement) -> int:
        """Return the noise key of `x` at this step.

        A sample receives the same noise regardless of how the batch is split across processes.
        """
        key = self.clock.key(self.key, 1)
        by_sample = not self.is_weight or place.rows is not None
        return with_origin(key, self.clock.origin(x)) if by_sample else key

    def replace_bits(self, bits: BitWidth) -> None:
        """Replace the bit-width before training, for example with that of a group."""
        self.bits = bits

    def freeze(self, bits: int | None = None) -> None:
        """Fix the bit-width at `bits` (default: the nearest allowed width).

        From then on, values are rounded in training if `rounds_once_frozen` is true.

        Raises:
            UserError: `bits` is not allowed, or the width is already frozen at a different value.
        """
        self.bits.freeze(bits)

    def start_at(self, bits: float) -> None:
        """Set the bit-width from which training continues, as in a warm start.

        Raises:
            UserError: the bit-width is frozen.
        """
        self.bits.start_at(bits)

    def forward(self, x: Tensor, axis: int | None = 0, rows: Tensor | None = None) -> Tensor:
        """Return the quantized tensor.

        Args:
            x: floating-point tensor of any shape.
            axis: dimension of the output channels, used with per-channel boundaries; None is
                treated as 0.
            rows: index of each row, shape (len(x),), if `x` contains rows looked up in a weight.

        Returns:
            A tensor of the shape and dtype of `x`; `x` itself while `observer` is set.
        """
        if self.observer is not None:
            if rows is None:
                self.observer(x.movedim(axis or 0, 0) if self.channels > 1 else x)
            return x
        place = Placement(axis or 0, rows)
        if self.training and not (self.bits.is_frozen and self.rounds_once_frozen):
            return self.train_forward(x, place)
        return hard_quantize(x, self.boundary_for(x, place))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # The grid itself is not in the state dict, only its integer code.
        self.grid = GRID_CODES[int(self.grid_code)]

    def extra_repr(self) -> str:
        """Return the name, the grid and the number of boundaries."""
        return f"{self.name}, {self.grid.value}, channels={self.channels}"


def _problem(name: str, value: Any) -> str | None:
    fits = isinstance(value, type) and issubclass(value, FakeQuantizer)
    return None if fits else "not a subclass of nipq_search.quant.FakeQuantizer"


QUANTIZERS: Registry[type[FakeQuantizer]] = Registry(
    "quantizer", group="nipq_search.quantizers", check=_problem
)
"""Registered quantizers by the name used in configurations."""
