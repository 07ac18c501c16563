"""Quantize by the fastest path there is for a tensor: C on a CPU, else torch operations.

All paths compute the same: `quant.functional` is the mathematics, `quant.noise` the noise.
"""

from __future__ import annotations

from torch import Tensor

from nipq_search.quant import functional as F
from nipq_search.quant import noise
from nipq_search.quant.functional import Boundary
from nipq_search.quant.kernels import cpu

__all__ = ["hard_quantize", "pseudo_quantize"]


def pseudo_quantize(x: Tensor, boundary: Boundary, key: int, empirical: bool = False) -> Tensor:
    """`x` with noise of one step inside the boundaries, the boundary outside.

    Args:
        x: float32 or float64, any shape. Noise belongs to elements in the order of memory.
        boundary: what determines the range.
        key: 64 bits that determine the noise.
        empirical: draw from the tensor's own rounding residuals rather than uniformly.
    """
    x = noise.dense(x)
    if cpu.serves(x, boundary):
        return cpu.quantize(x, boundary, key, empirical)
    range_ = boundary.range(x.dim())
    if empirical:
        residuals = noise.residuals_of(x, *range_[:3], boundary.axis)
        drawn = noise.drawn_from(residuals, x.shape, key)
    else:
        drawn = noise.uniform_noise(x.shape, key, x.device, x.dtype)
    return F.pseudo_quantize(x, range_, drawn.as_strided(x.shape, x.stride()))


def hard_quantize(x: Tensor, boundary: Boundary) -> Tensor:
    """`x` rounded to its grid; gradients straight through."""
    if cpu.serves(x, boundary):
        return cpu.quantize(noise.dense(x), boundary)
    return F.hard_quantize(x, boundary.range(x.dim()))
