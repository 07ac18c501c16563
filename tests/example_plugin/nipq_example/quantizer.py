"""A quantizer that learns the truncation boundary under hard rounding at a fixed bit-width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nipq_search.quant import FakeQuantizer
from nipq_search.quant.numerics.functional import MIN_BOUNDARY


class Clip(FakeQuantizer):
    """A quantizer that rounds during training and learns the boundary directly."""

    learns_bits = False

    def __init__(self, name, bits, channels, *args, **kwargs):
        """Create a quantizer with a boundary of 1."""
        super().__init__(name, bits, channels, *args, **kwargs)
        self.boundary = nn.Parameter(torch.ones(channels))

    def set_boundary(self, statistics):
        """Start at the calibrated boundary."""
        self.boundary.copy_(statistics.alpha.expand(self.channels))

    def alpha(self, elements_per_boundary: float = 1.0) -> Tensor:
        """Return the truncation boundary, shape (channels,)."""
        return self.boundary.abs().clamp(min=MIN_BOUNDARY)

    @torch.no_grad()
    def scale_range(self, factor: Tensor) -> None:
        """Multiply the boundary and the minimum by `factor`."""
        self.boundary.mul_(factor)
        if self.channels == 1:
            self.minimum.mul_(factor)
