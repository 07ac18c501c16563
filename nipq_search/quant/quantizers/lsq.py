"""LSQ: learned step size with the straight-through estimator (Esser et al., arXiv 1902.08153)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nipq_search.quant.numerics.functional import MIN_BOUNDARY, Grid, scale_gradient
from nipq_search.quant.numerics.noise import NoiseClock
from nipq_search.quant.quantizers.base import FakeQuantizer, TensorRole
from nipq_search.quant.quantizers.bit_width import BitWidth
from nipq_search.quant.quantizers.statistics import TensorStatistics


class LSQ(FakeQuantizer):
    """Trains with hard rounding at a fixed bit-width; the step is the learned parameter.

    The initial step, `2 * mean|x| / sqrt(Q)`, and the gradient scale, `1 / sqrt(N * Q)`, follow
    the paper. Q is the highest grid integer, and N the number of weights, or of features per
    sample, that share one step. Signed grids are symmetric, as in all quantizers here.
    """

    learns_bits = False
    scales_gradient = True
    free_start = False
    initial: Tensor

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
        """Create a quantizer with a step of 1; see `FakeQuantizer`."""
        super().__init__(name, bits, channels, clock, key, proxy, role)
        self.step = nn.Parameter(torch.ones(channels))
        # NaN until `set_boundary` is called: no step equals NaN, so no step counts as untrained.
        self.register_buffer("initial", torch.full((channels,), math.nan), persistent=False)

    def _levels(self, bits: int) -> int:
        """Return the truncation boundary in units of the step: the largest integer of the grid.

        For an affine grid, return the width of the whole range in units of the step.
        """
        return (1 << (bits - 1 if self.grid is Grid.SIGNED else bits)) - 1

    def set_boundary(self, statistics: TensorStatistics) -> None:
        """Set the step to the paper's initial value.

        The paper has no affine grids; their step is derived from the calibrated boundary.
        """
        affine = self.grid is Grid.AFFINE
        initial = statistics.alpha if affine else 2.0 * statistics.mean_abs
        self.initial = initial.expand(self.channels).clone()
        self.step.copy_(self._initial_step())

    @torch.no_grad()
    def scale_range(self, factor: Tensor) -> None:
        """Multiply the step and, if there is a single boundary, the minimum by `factor`."""
        self.step.mul_(factor)
        if self.channels == 1:
            self.minimum.mul_(factor)

    def _initial_step(self) -> Tensor:
        """Return the paper's initial step at the current bit-width."""
        levels = self._levels(self.bits.hard())
        return self.initial / (levels if self.grid is Grid.AFFINE else levels**0.5)

    def alpha(self, elements_per_boundary: float = 1.0) -> Tensor:
        """Return the truncation boundary, shape (channels,), with the paper's gradient scale."""
        levels = self._levels(self.bits.hard())
        alpha = scale_gradient(self.step.abs(), (elements_per_boundary * levels) ** -0.5) * levels
        return alpha.clamp(min=MIN_BOUNDARY)

    @contextmanager
    def _adjusted_step(self) -> Iterator[None]:
        """Adjust the step to a bit-width that changes within the context.

        A trained step is rescaled to preserve the boundary; an untrained one is initialized again.
        """
        before = self._levels(self.bits.hard())
        untrained = torch.equal(self.step, self._initial_step())
        yield
        with torch.no_grad():
            if untrained:  # the paper's initial step depends on the bit-width
                self.step.copy_(self._initial_step())
            else:
                self.step.mul_(before / self._levels(self.bits.hard()))

    def replace_bits(self, bits: BitWidth) -> None:
        """Replace the bit-width and adjust the step; see `_adjusted_step`."""
        with self._adjusted_step():
            super().replace_bits(bits)

    def freeze(self, bits: int | None = None) -> None:
        """Freeze the bit-width and adjust the step; see `_adjusted_step`.

        Raises:
            UserError: see `FakeQuantizer.freeze`.
        """
        with self._adjusted_step():
            super().freeze(bits)

    def start_at(self, bits: float) -> None:
        """Change the bit-width and adjust the step; see `_adjusted_step`.

        Raises:
            UserError: the bit-width is frozen.
        """
        with self._adjusted_step():
            super().start_at(bits)
