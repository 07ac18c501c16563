"""Ranges that fit the bit-width at which a training starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nipq_search.quant.prepare import quantizers
from nipq_search.quant.quantizer import FakeQuantizer
from nipq_search.quant.statistics import least_error_shares
from nipq_search.quant.trace import unchanged_mode

_SAMPLE = 1 << 14
_MOST = 1.5
"""Largest factor on a range that is tried."""


def _rows(quantizer: FakeQuantizer, x: Tensor) -> Tensor:
    """A tensor as one row for each boundary; of an activation an even sample."""
    x = x.detach().float()
    if quantizer.role == "weight":
        return x.reshape(quantizer.channels, -1).clone()
    values = x.reshape(-1)
    return values[:: (values.numel() // _SAMPLE) | 1].clone()[None]


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
    short training does not get there. Ranges that were learned at other widths are multiplied by
    the ratio of the least-error range now to the one then, which leaves what training made of
    them. Without that, a first boundary that is part of a quantizer's method stays.

    Args:
        model: prepared and calibrated, bit-widths where they are to start.
        calibration: runs the model on data; what comes first counts.
        before: bit-widths at which the ranges were learned; None where they come from calibration.
    """
    found = quantizers(model)
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
        alpha = quantizer.alpha().detach().float()

        def shares(bits: float) -> Tensor:
            return least_error_shares(rows, alpha, quantizer.grid, quantizer.minimum, bits, _MOST)  # noqa: B023

        now = float(quantizer.bits.soft().detach())
        factor = shares(now)
        if before is not None:
            factor = factor / shares(before[name]) if before[name] != now else factor.new_ones(1)
        quantizer.scale_range(factor)
