"""The family of fake quantizers: what they share, and the registry.

Life cycle of a quantizer: built by `prepare`; activations observe calibration batches; it is
initialized from what was seen; it trains; `freeze` fixes its bit-width; hard training and
evaluation follow. To add a quantizer write one file like `nipq.py` and one line that registers it
in `nipq_search/quant/__init__.py`; another package offers an entry point instead.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nipq_search.quant.kernels import hard_quantize
from nipq_search.quant.numerics.functional import Boundary, Grid
from nipq_search.quant.numerics.noise import NoiseClock, placed
from nipq_search.quant.quantizers.bit_width import BitWidth
from nipq_search.quant.quantizers.statistics import TensorStatistics
from nipq_search.registry import Registry

_GRIDS = (Grid.SIGNED, Grid.UNSIGNED, Grid.AFFINE)


class Placement(NamedTuple):
    """Which boundary serves which element: channels lie along `axis`, or `rows` names them."""

    axis: int = 0
    rows: Tensor | None = None


class FakeQuantizer(nn.Module, abc.ABC):
    """Quantizes one tensor in floating point. Subclasses own the boundary's parameter.

    Args:
        name: name of the tensor, for example `conv1.weight` or `conv1.input`.
        bits: its bit-width.
        channels: number of boundaries: 1, or the number of a weight's output channels.
        clock: the model's noise clock.
        key: number of this tensor in the model, part of the key of its noise.
        proxy: law of the noise, for quantizers that have one.

    While `observer` is set, as during calibration, tensors are shown to it, channels first where
    there are several, and pass unchanged; rows that are looked up are not shown.
    """

    learns_bits = True
    """Whether gradient descent can move the bit-width."""

    learns_boundary = True
    """Whether the boundary has a parameter."""

    starts_anywhere = True
    """Whether the boundary's first value is free; false where it is part of the method."""

    rounds_once_frozen = True
    """Whether training with a frozen bit-width rounds; else it goes on as before, for instance
    with noise. Evaluation always rounds."""

    scales_gradient = False
    """Whether `alpha` asks how many elements a boundary serves."""

    minimum: Tensor
    grid_code: Tensor

    def __init__(
        self, name: str, bits: BitWidth, channels: int, clock: NoiseClock, key: int, proxy: str
    ) -> None:
        """Build an uninitialized quantizer; `initialize` gives it its values."""
        super().__init__()
        self.name, self.channels, self.key, self.proxy = name, channels, key, proxy
        self.bits = bits
        self.clock = clock
        self.role = "activation"
        self.observer: Callable[[Tensor], None] | None = None
        self.register_buffer("minimum", torch.zeros(1))
        self.register_buffer("grid_code", torch.zeros(1, dtype=torch.int64))
        self.grid = Grid.SIGNED

    def initialize(self, statistics: TensorStatistics) -> None:
        """Set grid and boundary from calibration."""
        self.grid = statistics.grid
        with torch.no_grad():
            self.grid_code.fill_(_GRIDS.index(statistics.grid))
            self.minimum.copy_(statistics.minimum)
            self.set_boundary(statistics)

    @abc.abstractmethod
    def set_boundary(self, statistics: TensorStatistics) -> None:
        """Give the boundary its starting value."""

    @abc.abstractmethod
    def alpha(self, served: float = 1.0) -> Tensor:
        """The truncation boundary, shape (channels,), with the gradient that training uses.

        It is `functional.LEAST_BOUNDARY` or more.

        Args:
            served: elements that one boundary serves; of an activation those of one sample.
        """

    @abc.abstractmethod
    def scale_range(self, factor: Tensor) -> None:
        """Multiply the range by factors of shape (1,) or (channels,), for a start elsewhere."""

    def train_forward(self, x: Tensor, place: Placement) -> Tensor:
        """What an unfrozen quantizer computes in training mode."""
        return hard_quantize(x, self.boundary_for(x, place))

    def boundary_for(
        self, x: Tensor, place: Placement | None = None, bits: Tensor | None = None
    ) -> Boundary:
        """What determines the range of `x`, at `bits` (default: the hard width)."""
        place = place or Placement()
        served = self._served(x, place) if self.scales_gradient and self.training else 1.0
        alpha = self.alpha(served)
        if alpha.dtype in (torch.bfloat16, torch.float16):
            alpha = alpha.float()  # a grid of more than 8 bits needs it
        if self.channels > 1 and place.rows is not None:
            alpha = alpha[place.rows]
        if bits is None:
            bits = alpha.new_full((1,), self.bits.hard())
        return Boundary(alpha, bits.to(alpha.dtype), self.grid, self.minimum, place.axis)

    def _served(self, x: Tensor, place: Placement) -> float:
        if self.role != "weight":
            boundaries = len(x)
        elif place.rows is not None:
            if self.channels == 1:
                return max(1.0, x.numel() * self.clock.whole())
            boundaries = len(x)
        else:
            boundaries = self.channels
        return max(1.0, x.numel() / max(1, boundaries))

    def noise_key(self, x: Tensor, place: Placement) -> int:
        """Key of the noise that `x` gets at this step; a sample's is the same in any share."""
        key = self.clock.key(self.key, 1)
        by_sample = self.role != "weight" or place.rows is not None
        return placed(key, self.clock.origin(x)) if by_sample else key

    def use(self, bits: BitWidth) -> None:
        """Take another bit-width, before training, as the member of a group."""
        self.bits = bits

    def freeze(self, bits: int | None = None) -> None:
        """Fix the bit-width; training continues with hard quantization."""
        self.bits.freeze(bits)

    def start_at(self, bits: float) -> None:
        """Let learning continue from another bit-width, for a warm start."""
        self.bits.start_at(bits)

    def forward(self, x: Tensor, axis: int | None = 0, rows: Tensor | None = None) -> Tensor:
        """Return `x` quantized, of the same shape and dtype.

        Args:
            x: the tensor.
            axis: dimension of the output channels, where there are boundaries by channel.
            rows: for rows looked up in a weight: their numbers, shape (len(x),).
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
        self.grid = _GRIDS[int(self.grid_code)]

    def extra_repr(self) -> str:
        """Name and grid."""
        return f"{self.name}, {self.grid.value}, channels={self.channels}"


def _problem(name: str, value: Any) -> str | None:
    fits = isinstance(value, type) and issubclass(value, FakeQuantizer)
    return None if fits else "not a subclass of nipq_search.quant.FakeQuantizer"


QUANTIZERS: Registry[type[FakeQuantizer]] = Registry(
    "quantizer", group="nipq_search.quantizers", check=_problem
)
"""Quantizers by the names that configurations use."""
