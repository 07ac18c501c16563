"""Ranges that fit the bit-width at which a training starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nipq_search.quant.insertion.prepare import quantizers
from nipq_search.quant.numerics.functional import Grid
from nipq_search.quant.quantizers.base import FakeQuantizer
from nipq_search.quant.quantizers.statistics import least_error_shares
from nipq_search.quant.tracing.trace import unchanged_mode

_SAMPLE = 1 << 14
_FREE = 1.5
"""Largest factor by which a range that was learned stays apart from the one of least error."""


def _rows(quantizer: FakeQuantizer, x: Tensor) -> Tensor:
    """A tensor as one row for each boundary, an even sample where a row is long."""
    x = x.detach().float()
    rows = x.reshape(quantizer.channels if quantizer.role == "weight" else 1, -1)
    return rows[:, :: (rows.shape[1] // _SAMPLE) | 1].clone()


def _ignore(x: Tensor) -> None:
    """Observe nothing; the quantizer passes its tensor on."""


@torch.no_grad()
def fit_ranges(
    model: nn.Module,
    calibration: Callable[[nn.Module], None],
    before: Mapping[str, float] | None = None,
) -> None:
    """Scale ranges to where the squared error of rounding at the present bit-widths is least.

    A boundary that holds a tensor's extremes is far from the best one at two or three bits, and a
    short training does not get there. A range that was learned at another width keeps its ratio to
    the range of least error, within limits. A first boundary that is part of a quantizer's method
    stays.

    Args:
        model: prepared and calibrated, bit-widths where they are to start.
        calibration: runs the model on data; what comes first counts.
        before: bit-widths at which the ranges were learned; None where they come from calibration.
    """
    found = quantizers(model)
    if before is None and not any(quantizer.starts_anywhere for quantizer in found.values()):
        return
    seen: dict[str, Tensor] = {}

    def show(name: str) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            if name not in seen and x.numel() and bool(x.isfinite().all()):
                seen[name] = _rows(found[name], x)

        return observe

    for name, quantizer in found.items():
        if before is not None or quantizer.starts_anywhere:
            quantizer.observer = show(name)
        else:
            quantizer.observer = _ignore
    try:
        with unchanged_mode(model):
            calibration(model)
    finally:
        for quantizer in found.values():
            quantizer.observer = None
    for name, rows in seen.items():
        quantizer = found[name]
        now = float(quantizer.bits.soft().detach())
        if before is None:
            quantizer.scale_range(_best(quantizer, rows, now))
        elif now != before[name]:
            # By how much training left the best boundary. Wide grids care little for theirs.
            learned = (1 / _best(quantizer, rows, before[name])).clamp(1 / _FREE, _FREE)
            quantizer.scale_range(_best(quantizer, rows, now) * learned)


def _best(quantizer: FakeQuantizer, rows: Tensor, bits: float) -> Tensor:
    """The factor on a quantizer's range that gives the least error at `bits`."""
    alpha = quantizer.alpha().detach().float()
    if quantizer.grid is Grid.SIGNED:
        extent = rows.abs().amax(dim=1)
    elif quantizer.grid is Grid.UNSIGNED:
        extent = rows.amax(dim=1)
    else:
        extent = rows.amax(dim=1) - rows.amin(dim=1)
    whole = torch.where(extent > 0, extent / alpha, 1.0)  # of zeros any range will do
    minimum = quantizer.minimum * whole if quantizer.channels == 1 else quantizer.minimum
    return whole * least_error_shares(rows, alpha * whole, quantizer.grid, minimum, bits)
