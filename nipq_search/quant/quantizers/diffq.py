"""DiffQ: bit-widths learned under noise, boundaries from the data (arXiv 2104.09987)."""

from __future__ import annotations

import torch
from torch import Tensor

from nipq_search.quant.kernels import pseudo_quantize
from nipq_search.quant.numerics import widths
from nipq_search.quant.numerics.functional import LEAST_BOUNDARY, Boundary
from nipq_search.quant.numerics.noise import NoiseClock, not_compiled
from nipq_search.quant.quantizers.base import FakeQuantizer, Placement
from nipq_search.quant.quantizers.bit_width import BitWidth
from nipq_search.quant.quantizers.statistics import TensorStatistics


class DiffQ(FakeQuantizer):
    """Trains with uniform noise of one step at the continuous bit-width (eq. 5 to 7 there).

    Like the paper's: bit-widths are real numbers while they learn, a weight's boundary is the
    largest magnitude that it has at the moment, and no boundary is learned. Ours, so that it can
    be compared: the grids, boundaries by output channel rather than by groups of elements, and
    activations, whose boundary stays where calibration put it.
    """

    learns_boundary = False
    starts_anywhere = False
    boundary: Tensor

    def __init__(
        self, name: str, bits: BitWidth, channels: int, clock: NoiseClock, key: int, proxy: str
    ) -> None:
        """Build an uninitialized quantizer with a boundary of 1."""
        super().__init__(name, bits, channels, clock, key, proxy)
        self.register_buffer("boundary", torch.ones(channels))

    def set_boundary(self, statistics: TensorStatistics) -> None:
        """Take the calibrated boundary."""
        self.boundary.copy_(statistics.alpha.expand(self.channels))

    def alpha(self, served: float = 1.0) -> Tensor:
        """The truncation boundary, shape (channels,); it has no gradient."""
        return self.boundary.clamp(min=LEAST_BOUNDARY)

    def scale_range(self, factor: Tensor) -> None:
        """Leave it: it is the data's."""

    @not_compiled
    def train_forward(self, x: Tensor, place: Placement) -> Tensor:
        """Add noise at the continuous bit-width."""
        if self.role == "weight" and place.rows is None:
            self._follow(x, place.axis)
        draw = self.bits.draw(0.0, self.clock.step)
        boundary: Boundary = self.boundary_for(x, place)
        if draw is not None:
            soft = self.bits.soft().detach()
            width = soft if isinstance(draw.width, Tensor) else float(soft)
            boundary = boundary._replace(bits=widths.drawn_bits(draw._replace(width=width)))
        return pseudo_quantize(x, boundary, self.noise_key(x, place))

    @torch.no_grad()
    def _follow(self, x: Tensor, axis: int) -> None:
        """Move the boundary to the largest magnitude."""
        others = [d for d in range(x.dim()) if self.channels == 1 or d != axis % x.dim()]
        largest = x.detach().abs()
        if others:
            largest = largest.amax(others)
        self.boundary.copy_(largest.reshape(-1).to(self.boundary.dtype))
