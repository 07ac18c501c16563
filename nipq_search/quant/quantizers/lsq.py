"""LSQ: learned step size with the straight-through estimator (Esser et al., arXiv 1902.08153)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nipq_search.quant.numerics.functional import LEAST_BOUNDARY, Grid, scale_gradient
from nipq_search.quant.numerics.noise import NoiseClock
from nipq_search.quant.quantizers.base import FakeQuantizer
from nipq_search.quant.quantizers.bit_width import BitWidth
from nipq_search.quant.quantizers.statistics import TensorStatistics


class LSQ(FakeQuantizer):
    """Trains with hard rounding at a fixed bit-width; the step is the parameter.

    It keeps the paper's starting value, `2 * mean|x| / sqrt(Q)`, and its gradient scale,
    `1 / sqrt(N * Q)`, where Q is the highest grid integer and N the number of weights, or of
    features per sample, that one step serves. Signed grids are symmetric as everywhere here.
    """

    learns_bits = False
    scales_gradient = True
    starts_anywhere = False
    initial: Tensor

    def __init__(
        self, name: str, bits: BitWidth, channels: int, clock: NoiseClock, key: int, proxy: str
    ) -> None:
        """Build an uninitialized quantizer with a step of 1."""
        super().__init__(name, bits, channels, clock, key, proxy)
        self.step = nn.Parameter(torch.ones(channels))

    def _levels(self, bits: int) -> int:
        """Steps in a boundary: the highest integer of the grid (all of them where affine)."""
        return (1 << (bits - 1 if self.grid is Grid.SIGNED else bits)) - 1

    def set_boundary(self, statistics: TensorStatistics) -> None:
        """Start at the published value; an affine grid, which LSQ lacks, at the calibrated one."""
        affine = self.grid is Grid.AFFINE
        initial = statistics.alpha if affine else 2.0 * statistics.mean_abs
        self.register_buffer("initial", initial.expand(self.channels).clone(), persistent=False)
        self.step.copy_(self._published())

    @torch.no_grad()
    def scale_range(self, factor: Tensor) -> None:
        """Multiply step and minimum."""
        self.step.mul_(factor)
        if self.channels == 1:
            self.minimum.mul_(factor)

    def _published(self) -> Tensor:
        """The starting value of the step at the present bit-width."""
        levels = self._levels(self.bits.hard())
        return self.initial / (levels if self.grid is Grid.AFFINE else levels**0.5)

    def alpha(self, served: float = 1.0) -> Tensor:
        """The truncation boundary, shape (channels,), its gradient scaled as published."""
        levels = self._levels(self.bits.hard())
        alpha = scale_gradient(self.step.abs(), (served * levels) ** -0.5) * levels
        return alpha.clamp(min=LEAST_BOUNDARY)

    @contextmanager
    def _same_boundary(self) -> Iterator[None]:
        """Rescale the step when the bit-width changes, so that the boundary stays."""
        before = self._levels(self.bits.hard())
        untrained = "initial" in self._buffers and torch.equal(self.step, self._published())
        yield
        with torch.no_grad():
            if untrained:  # the published value is one of the bit-width
                self.step.copy_(self._published())
            else:
                self.step.mul_(before / self._levels(self.bits.hard()))

    def use(self, bits: BitWidth) -> None:
        """Take another bit-width; an untrained step starts at that one's published value."""
        with self._same_boundary():
            super().use(bits)

    def freeze(self, bits: int | None = None) -> None:
        """Fix the bit-width and keep the boundary where it is."""
        with self._same_boundary():
            super().freeze(bits)

    def start_at(self, bits: float) -> None:
        """Continue at another bit-width and keep the boundary where it is."""
        with self._same_boundary():
            super().start_at(bits)
