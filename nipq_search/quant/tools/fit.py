"""Fitting of quantization ranges to the bit-widths at which training starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nipq_search.quant.insertion.prepare import observed, quantizers
from nipq_search.quant.numerics.functional import Grid
from nipq_search.quant.quantizers.base import FakeQuantizer
from nipq_search.quant.quantizers.statistics import least_error_shares
from nipq_search.quant.tracing.trace import unchanged_mode

_SAMPLE_ELEMENTS = 1 << 14
"""Approximate number of elements per row that the error is computed from."""

_MAX_RATIO = 1.5
"""Largest ratio, either way, between a learned range and the least-error one that is kept."""


def _rows(quantizer: FakeQuantizer, x: Tensor) -> Tensor:
    """Return `x` as one row per boundary, subsampled at an even stride if rows are long."""
    x = x.detach().float()
    rows = x.reshape(quantizer.channels if quantizer.is_weight else 1, -1)
    return rows[:, :: (rows.shape[1] // _SAMPLE_ELEMENTS) | 1].clone()


@torch.no_grad()
def fit_ranges(
    model: nn.Module,
    calibration: Callable[[nn.Module], None],
    before: Mapping[str, float] | None = None,
) -> None:
    """Scale quantization ranges to minimize the squared rounding error at the current bit-widths.

    A boundary at the extremes of a tensor is far from optimal at two or three bits, and a short
    training does not correct it. A range that was learned at another bit-width keeps its ratio to
    the least-error range, within limits. Initial boundaries that are part of a quantizer's method
    are left unchanged.

    Args:
        model: a prepared and calibrated model, at its initial bit-widths.
        calibration: function that runs the model on data; the first value of each tensor is used.
        before: bit-widths, in bits by tensor name, at which the ranges were learned; None if the
            ranges come from calibration.
    """
    found = quantizers(model)
    if before is None and not any(quantizer.free_start for quantizer in found.values()):
        return
    seen: dict[str, Tensor] = {}

    def observer(name: str) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            if name not in seen and x.numel() and bool(x.isfinite().all()):
                seen[name] = _rows(found[name], x)

        return observe

    chosen = (n for n, q in found.items() if before is not None or q.free_start)
    with observed(model, {name: observer(name) for name in chosen}), unchanged_mode(model):
        calibration(model)
    for name, rows in seen.items():
        quantizer = found[name]
        now = float(quantizer.bits.soft().detach())
        if before is None:
            quantizer.scale_range(_best(quantizer, rows, now))
        elif now != before[name]:
            # Ratio of the learned range to the least-error one, limited because the error of wide
            # grids hardly depends on their boundary.
            learned = (1 / _best(quantizer, rows, before[name])).clamp(1 / _MAX_RATIO, _MAX_RATIO)
            quantizer.scale_range(_best(quantizer, rows, now) * learned)


def _best(quantizer: FakeQuantizer, rows: Tensor, bits: float) -> Tensor:
    """Return the factor on a quantizer's range that minimizes the error at `bits` bits."""
    alpha = quantizer.alpha().detach().float()
    if quantizer.grid is Grid.SIGNED:
        extent = rows.abs().amax(dim=1)
    elif quantizer.grid is Grid.UNSIGNED:
        extent = rows.amax(dim=1)
    else:
        extent = rows.amax(dim=1) - rows.amin(dim=1)
    whole = torch.where(extent > 0, extent / alpha, 1.0)  # any range fits a row of zeros
    minimum = quantizer.minimum * whole if quantizer.channels == 1 else quantizer.minimum
    return whole * least_error_shares(rows, alpha * whole, quantizer.grid, minimum, bits)
