"""NIPQ: pseudo-quantization noise, learned boundary and bit-width (arXiv 2206.00820)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nipq_search.quant.kernels import pseudo_quantize
from nipq_search.quant.kernels.compiled import noisy_node
from nipq_search.quant.numerics import functional as F
from nipq_search.quant.numerics import widths
from nipq_search.quant.numerics.noise import NoiseClock, centered_uniform, not_compiled, signed
from nipq_search.quant.quantizers.base import FakeQuantizer, Placement, TensorRole
from nipq_search.quant.quantizers.bit_width import BitWidth
from nipq_search.quant.quantizers.statistics import TensorStatistics


class NIPQ(FakeQuantizer):
    """Trains with noise one quantization step wide in place of rounding, then with hard rounding.

    The boundary is `start * softplus(boundary) / softplus(initial boundary)`. Because of the
    normalization by the initial value, boundaries of any size change at the same relative rate.
    With a plain softplus, a large boundary `alpha` would change more slowly: with SGD, by a factor
    of about `alpha**2`.
    """

    start: Tensor

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
        self.boundary = nn.Parameter(F.softplus_inverse(torch.ones(channels)))
        self.register_buffer("start", torch.ones(channels))

    def set_boundary(self, statistics: TensorStatistics) -> None:
        """Set the boundary to its calibrated value."""
        self.start.copy_(statistics.alpha.expand(self.channels))
        self.boundary.copy_(F.softplus_inverse(torch.ones_like(self.boundary)))

    @torch.no_grad()
    def scale_range(self, factor: Tensor) -> None:
        """Multiply the boundary and, if there is only one, the minimum by `factor`.

        The new boundary also becomes `start`, as after calibration.
        """
        self.start.copy_((self.alpha() * factor).clamp(min=F.MIN_BOUNDARY))
        self.boundary.copy_(F.softplus_inverse(torch.ones_like(self.boundary)))
        if self.channels == 1:
            self.minimum.mul_(factor)

    def alpha(self, elements_per_boundary: float = 1.0) -> Tensor:
        """Return the truncation boundary, shape (channels,)."""
        return F.positive(self.boundary, self.start)

    def train_forward(self, x: Tensor, place: Placement) -> Tensor:
        """Add noise at a drawn bit-width, or at the fixed or frozen one."""
        if torch.compiler.is_compiling() and place.rows is None:
            bits, alpha = self.bits, self.alpha()
            if alpha.dtype in (torch.bfloat16, torch.float16):
                alpha = alpha.float()
            return noisy_node(
                x,
                alpha,
                bits.theta,
                self.minimum,
                bits.marginal,
                bits.decayed,
                self.clock.count.clone(),
                signed(self.clock.seed, 64),
                self.key,
                bits.key,
                bits.hard() if bits.theta is None else 0,
                list(bits.allowed),
                self.grid.value,
                place.axis,
                self.proxy == "empirical",
            )
        return self._noisy(x, place)

    @not_compiled
    def _noisy(self, x: Tensor, place: Placement) -> Tensor:
        clock = self.clock
        draw = self.bits.draw(centered_uniform(clock.key(self.bits.key, 0)), clock.step)
        if place.rows is None and self.boundary.dtype is torch.float32:
            bits = self.bits.soft() if draw is None else draw.theta
            boundary = F.Boundary(
                self.boundary, bits, self.grid, self.minimum, place.axis, self.start, draw
            )
        else:
            drawn = None if draw is None else widths.drawn_bits(draw)
            boundary = self.boundary_for(x, place, drawn)
        return pseudo_quantize(x, boundary, self.noise_key(x, place), self.proxy == "empirical")
