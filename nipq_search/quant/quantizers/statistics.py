"""Starting values: what a tensor looked like in calibration, and the boundary that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nipq_search.quant.numerics import functional as F
from nipq_search.quant.numerics.functional import Grid

_SAMPLE = 1 << 14


@dataclass(frozen=True, kw_only=True)
class TensorStatistics:
    """Starting values of one tensor's quantizer.

    Attributes:
        grid: shape of its grid.
        alpha: truncation boundary, shape (1,) or (channels,); positive.
        mean_abs: mean absolute value, same shape.
        minimum: least value of an affine tensor, shape (1,); zero otherwise.
    """

    grid: Grid
    alpha: Tensor
    mean_abs: Tensor
    minimum: Tensor


def weight_statistics(weight: Tensor, per_channel: bool, mse: bool) -> TensorStatistics:
    """Statistics of a weight of shape (channels, ...): from its absolute maximum.

    Args:
        weight: the float weight.
        per_channel: one boundary per output channel (dimension 0) rather than one in all.
        mse: shrink the boundary to where the squared error of 4-bit rounding is least.
    """
    rows = weight.detach().float()
    rows = rows.reshape(len(rows), -1) if per_channel else rows.reshape(1, -1)
    alpha = rows.abs().amax(dim=1)
    # A row of zeros still needs a positive boundary; any will do.
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
    """The share of each row's range, both ends alike, whose squared rounding error is least.

    Args:
        rows: values, shape (rows, n).
        alpha: truncation boundary of each row, shape (rows,).
        grid: shape of the grid.
        minimum: of affine rows, shape (1,).
        bits: width of the grid; fractions are fine.

    Returns:
        Shares of shape (rows,), of 64 between a tenth and all.
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
        """Look at one batch."""
        values = x.detach().float().reshape(-1)
        values = values[values.isfinite()]
        if not values.numel():
            return
        self.minimum = min(self.minimum, float(values.min()))
        # An even stride would visit few channels only.
        self.samples.append(values[:: (values.numel() // _SAMPLE) | 1])

    def statistics(
        self, percentile: float, signed_allowed: bool, mse: bool = False
    ) -> TensorStatistics:
        """Choose the grid and the boundary from everything seen.

        A tensor without negative values is unsigned. One whose range lies much more to one side
        of zero than to the other (SiLU, h-swish, GELU, LeakyReLU, ELU) is affine: a signed grid
        would waste a good part of its levels. Everything else is signed.

        Args:
            percentile: share of the values inside the boundary.
            mse: shrink the boundary to where the squared error of 4-bit rounding is least.
            signed_allowed: false where the allowed set holds widths too small for a signed grid.
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
        # A tensor of zeros still needs a positive boundary; any will do.
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
    """The value at or below which the share `percentile` lies; the maximum where that is <= 0.

    (More than `percentile` zeros would put a boundary at zero. `torch.quantile` refuses more than
    16 million values.)
    """
    end = values.kthvalue(max(1, math.ceil(percentile * values.numel()))).values
    return torch.where(end > 0, end, values.max())
