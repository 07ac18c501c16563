"""Fitting of quantization ranges to the bit-widths at which training starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nipq_search.quant.insertion.prepare import observing, quantizers
from nipq_search.quant.numerics.functional import Grid
from nipq_search.quant.quantizers.base import FakeQuantizer
from nipq_search.quant.quantizers.statistics import least_error_shares
from nipq_search.quant.tracing.trace import eval_without_grad

_SAMPLE_ELEMENTS = 1 << 14
"""Approximate number of elements per boundary from which the error is computed."""

_MAX_RATIO = 1.5
"""Limit on the ratio between a learned range and the least-error one, in either direction."""


def _rows(quantizer: FakeQuantizer, x: Tensor) -> Tensor:
    """Return `x` as one row per boundary, subsampled at regular intervals if rows are long."""
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
    training run does not move it far enough. A range that was learned at a different bit-width
    keeps its ratio to the least-error range, within limits. Initial boundaries that a quantizer's
    method prescribes are left unchanged.

    Args:
        model: a prepared and calibrated model, at its initial bit-widths.
        calibration: function that runs the model on data. Only the first value of each tensor
            that is finite and not empty is used.
        before: bit-widths, in bits by tensor name, at which the ranges were learned; None if the
            ranges come from calibration.
    """
    found = quantizers(model)
    if before is None and not any(quantizer.free_start for quantizer in found.values()):
        return
    samples: dict[str, Tensor] = {}

    def observer(name: str) -> Callable[[Tensor], None]:
        """Return an observer for the tensor `name`."""

        def observe(x: Tensor) -> None:
            """Store rows of `x`, unless earlier ones were stored or `x` is empty or not finite."""
            if name not in samples and x.numel() and bool(x.isfinite().all()):
                samples[name] = _rows(found[name], x)

        return observe

    chosen = (n for n, q in found.items() if before is not None or q.free_start)
    with observing(model, {name: observer(name) for name in chosen}), eval_without_grad(model):
        calibration(model)
    for name, rows in samples.items():
        quantizer = found[name]
        bits = float(quantizer.bits.soft().detach())
        if before is None:
            quantizer.scale_range(_factors(quantizer, rows, bits))
        elif bits != before[name]:
            # The ratio of the learned range to the least-error one is limited, because the error
            # of grids with many levels hardly depends on their boundary.
            learned = 1 / _factors(quantizer, rows, before[name])
            learned = learned.clamp(1 / _MAX_RATIO, _MAX_RATIO)
            quantizer.scale_range(_factors(quantizer, rows, bits) * learned)


def _factors(quantizer: FakeQuantizer, rows: Tensor, bits: float) -> Tensor:
    """Return factors by which to scale a quantizer's range for the least error at `bits` bits."""
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
