"""DiffQ: bit-widths learned with noise, boundaries set from the data (arXiv 2104.09987)."""

from __future__ import annotations

import torch
from torch import Tensor

from nipq_search.quant.kernels import pseudo_quantize
from nipq_search.quant.numerics import widths
from nipq_search.quant.numerics.functional import MIN_BOUNDARY, Boundary
from nipq_search.quant.numerics.noise import NoiseClock, not_compiled
from nipq_search.quant.quantizers.base import FakeQuantizer, Placement, TensorRole
from nipq_search.quant.quantizers.bit_width import BitWidth
from nipq_search.quant.quantizers.statistics import TensorStatistics


class DiffQ(FakeQuantizer):
    """Trains with uniform noise one step wide at the continuous bit-width (equations 5 to 7).

    As in the paper, bit-widths are real numbers during learning, the boundary of a weight is its
    current largest magnitude, and no boundary is learned. For comparability with the other
    quantizers, three things differ from the paper: the grids are those of the other quantizers,
    weights have boundaries per output channel rather than per group of elements, and activations
    are quantized too, with the boundary from calibration.
    """

    learns_boundary = False
    free_start = False
    boundary: Tensor

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
        """Create a quantizer with a boundary of 1; see `FakeQuantizer`."""
        super().__init__(name, bits, channels, clock, key, proxy, role)
        self.register_buffer("boundary", torch.ones(channels))

    def set_boundary(self, statistics: TensorStatistics) -> None:
        """Set the boundary to its calibrated value; in training, that of a weight changes."""
        self.boundary.copy_(statistics.alpha.expand(self.channels))

    def alpha(self, elements_per_boundary: float = 1.0) -> Tensor:
        """Return the truncation boundary, shape (channels,), which has no gradient."""
        return self.boundary.clamp(min=MIN_BOUNDARY)

    def scale_range(self, factor: Tensor) -> None:
        """Leave the range unchanged, because it is determined by the data."""

    @not_compiled
    def train_forward(self, x: Tensor, place: Placement) -> Tensor:
        """Add noise at the continuous bit-width, or at the fixed or frozen one."""
        if self.is_weight and place.rows is None:
            self._set_largest(x, place.axis)
        # The draw supplies the gradient; the continuous bit-width replaces the drawn one.
        draw = self.bits.draw(0.0, self.clock.step)
        boundary: Boundary = self.boundary_for(x, place)
        if draw is not None:
            soft = self.bits.soft().detach()
            width = soft if isinstance(draw.width, Tensor) else float(soft)
            boundary = boundary._replace(bits=widths.drawn_bits(draw._replace(width=width)))
        return pseudo_quantize(x, boundary, self.noise_key(x, place))

    @torch.no_grad()
    def _set_largest(self, x: Tensor, axis: int) -> None:
        """Set the boundary to the largest magnitude of `x`, or to that of each channel."""
        others = [d for d in range(x.dim()) if self.channels == 1 or d != axis % x.dim()]
        largest = x.detach().abs()
        if others:
            largest = largest.amax(others)
        self.boundary.copy_(largest.reshape(-1).to(self.boundary.dtype))
