"""Calibration statistics of tensors and the initial grids and boundaries derived from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nipq_search.quant.numerics import functional as F
from nipq_search.quant.numerics.functional import Grid

_SAMPLE_ELEMENTS = 1 << 14
"""Approximate number of elements sampled from a tensor per calibration batch."""


@dataclass(frozen=True, kw_only=True)
class TensorStatistics:
    """Initial values of one quantizer.

    Attributes:
        grid: type of the grid.
        alpha: truncation boundary, shape (1,) or (channels,); positive.
        mean_abs: mean absolute value, same shape as `alpha`.
        minimum: lower end of an affine range, shape (1,); zero for other grids.
    """

    grid: Grid
    alpha: Tensor
    mean_abs: Tensor
    minimum: Tensor


def weight_statistics(weight: Tensor, per_channel: bool, mse: bool) -> TensorStatistics:
    """Return the statistics of a weight; its boundary is the absolute maximum, or less with `mse`.

    Args:
        weight: float weight of shape (channels, ...).
        per_channel: whether to use one boundary per output channel (dimension 0) instead of a
            single one.
        mse: whether to shrink the boundary to minimize the squared error of 4-bit rounding.

    Returns:
        Statistics with a signed grid.
    """
    rows = weight.detach().float()
    rows = rows.reshape(len(rows), -1) if per_channel else rows.reshape(1, -1)
    alpha = rows.abs().amax(dim=1)
    # A row of zeros still needs a positive boundary; the value is arbitrary.
    alpha = torch.where(alpha > 0, alpha, torch.ones_like(alpha))
    if mse:
        zero = torch.zeros(1, device=rows.device)
        alpha = alpha * least_error_shares(rows, alpha, Grid.SIGNED, zero, bits=4)
    return TensorStatistics(
        grid=Grid.SIGNED,
        alpha=alpha,
        mean_abs=rows.abs().mean(dim=1).clamp(min=1e-8),
        minimum=torch.zeros(1, device=rows.device),
    )


def least_error_shares(
    rows: Tensor, alpha: Tensor, grid: Grid, minimum: Tensor, bits: float
) -> Tensor:
    """Return the factor for each row's range that minimizes the squared rounding error.

    Args:
        rows: values, shape (rows, n).
        alpha: truncation boundary of each row, shape (rows,).
        grid: type of the grid.
        minimum: lower end of the range if the grid is affine, shape (1,).
        bits: bit-width of the grid in bits, possibly fractional.

    Returns:
        Factors of shape (rows,) for both ends of the range: the best of 64 values from 0.1 to 1.
    """
    best, best_error = torch.ones_like(alpha), torch.full_like(alpha, float("inf"))
    width = torch.full((1,), float(bits), device=rows.device)
    for share in torch.linspace(0.1, 1.0, 64).tolist():
        range_ = F.quantization_range(alpha[:, None] * share, width, grid, minimum * share)
        error = (F.hard_quantize(rows, range_) - rows).square().sum(dim=1)
        best = torch.where(error < best_error, share, best)
        best_error = torch.minimum(error, best_error)
    return best


@dataclass
class Observer:
    """Collects a strided sample of an activation tensor over calibration batches."""

    samples: list[Tensor] = field(default_factory=list)
    minimum: float = float("inf")

    def __call__(self, x: Tensor) -> None:
        """Record one batch, without its infinite and NaN values."""
        values = x.detach().float().reshape(-1)
        values = values[values.isfinite()]
        if not values.numel():
            return
        self.minimum = min(self.minimum, float(values.min()))
        # The stride is odd, because an even one would often visit only a few of the channels.
        self.samples.append(values[:: (values.numel() // _SAMPLE_ELEMENTS) | 1])

    def statistics(
        self, percentile: float, signed_allowed: bool, mse: bool = False
    ) -> TensorStatistics:
        """Choose the grid and the boundary from all recorded values.

        Tensors without negative values use an unsigned grid. Tensors whose range is strongly
        asymmetric around zero (after SiLU, h-swish, GELU, LeakyReLU or ELU) use an affine grid,
        because a signed grid would waste many of its levels. All others use a signed grid, or an
        affine one if a signed grid is not allowed. If all values are zero, or none was recorded,
        the boundary is 1 and the grid is not unsigned.

        Args:
            percentile: fraction of the values inside the boundary, in (0, 1].
            signed_allowed: whether every allowed bit-width is large enough for a signed grid.
            mse: whether to shrink the boundary to minimize the squared error of 4-bit rounding.

        Returns:
            Statistics with one boundary.
        """
        values = torch.cat(self.samples) if self.samples else torch.zeros(1)
        minimum = torch.zeros(1, device=values.device)
        low = -_upper_end(-values, percentile).clamp(min=0.0)
        high = _upper_end(values, percentile).clamp(min=0.0)
        if self.minimum >= 0.0 and bool(values.any()):
            grid, alpha = Grid.UNSIGNED, high
        elif high - low < 1.5 * torch.maximum(high, -low) or not signed_allowed:
            grid, alpha, minimum = Grid.AFFINE, high - low, low.reshape(1)
        else:
            grid, alpha = Grid.SIGNED, _upper_end(values.abs(), percentile)
        # A tensor of zeros still needs a positive boundary; the value is arbitrary.
        alpha = torch.where(alpha > 0, alpha, 1.0).reshape(1)
        if mse:
            share = least_error_shares(values[None], alpha, grid, minimum, bits=4)
            alpha, minimum = alpha * share, minimum * share
        return TensorStatistics(
            grid=grid,
            alpha=alpha,
            mean_abs=values.abs().mean().clamp(min=1e-8).reshape(1),
            minimum=minimum,
        )


def _upper_end(values: Tensor, percentile: float) -> Tensor:
    """Return a percentile of `values`, or their maximum if the percentile is not positive.

    `percentile` is a fraction from 0 to 1.

    The maximum avoids a boundary of zero for sparse tensors. `torch.quantile` is not used
    because it rejects more than 16 million values.
    """
    end = values.kthvalue(max(1, math.ceil(percentile * values.numel()))).values
    return torch.where(end > 0, end, values.max())
