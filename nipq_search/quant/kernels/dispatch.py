"""Quantize by the fastest path there is for a tensor: C on a CPU, Triton on a GPU, else torch."""

from __future__ import annotations

import torch
from torch import Tensor

from nipq_search.quant.kernels import cpu
from nipq_search.quant.kernels.function import Backend, plain, quantize
from nipq_search.quant.kernels.kept import Kept
from nipq_search.quant.numerics import functional as F
from nipq_search.quant.numerics import noise
from nipq_search.quant.numerics.functional import Boundary, Range


def backend_for(x: Tensor, boundary: Boundary) -> Backend | None:
    """The kernels that quantize `x`; None where torch operations have to."""
    alpha = boundary.alpha
    if alpha.dtype is not torch.float32 or alpha.device != x.device:
        return None  # torch has a clear error for tensors on two devices
    if cpu.available(x):
        return cpu
    if x.is_cuda:
        from nipq_search.quant.kernels import cuda  # Triton takes a while to load

        return cuda if cuda.available(x) else None
    return None


def pseudo_quantize(x: Tensor, boundary: Boundary, key: int, empirical: bool = False) -> Tensor:
    """`x` with noise of one step inside the boundaries, the boundary outside.

    Args:
        x: any floating-point dtype, which the result has too, and any shape. What is below float32
            is computed in float32. Noise belongs to elements in the order of memory.
        boundary: what determines the range.
        key: 64 bits that determine the noise, and perhaps an origin; see `noise.placed`.
        empirical: draw from the tensor's own rounding residuals rather than uniformly.
    """
    x = noise.dense(x)
    backend = backend_for(x, boundary)
    # Only those in C compute that on the way. Its last bit, which is another than torch's, would
    # move an element across the boundary, and all entries of a table of residuals after it.
    if backend is not cpu or empirical:
        boundary = boundary.resolved()
    if backend is not None:
        return quantize(backend, x, boundary, key, empirical)
    value, range_ = _wide(x), boundary.range(x.dim())
    drawn = _noise(value, range_, boundary.axis, key, empirical)
    return F.pseudo_quantize(value, range_, drawn).to(x.dtype)


def _noise(x: Tensor, range_: Range, axis: int, key: int, empirical: bool) -> Tensor:
    """Noise for a dense tensor, in its layout, by torch operations."""
    if empirical:
        drawn = noise.drawn_from(noise.residuals_of(x, *range_[:3], axis), x.shape, key)
    else:
        drawn = noise.uniform_noise(x.shape, key, x.device, x.dtype)
    return drawn.as_strided(x.shape, x.stride())


def gradients(
    grad: Tensor, x: Tensor, boundary: Boundary, key: int, empirical: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of `pseudo_quantize` by `x`, `boundary.alpha` and `boundary.bits`.

    Args:
        grad: of the output.
        x: as there, like the rest.
        boundary: without `start` and `draw`.
        key: as there.
        empirical: as there.
    """
    dense = noise.dense(x)
    value, axis, grid = _wide(dense), boundary.axis, boundary.grid
    grad = plain(grad, value.stride(), value.dtype)
    if (backend := backend_for(dense, boundary)) is None:
        range_ = boundary.range(x.dim())
        drawn = _noise(value, range_, axis, key, empirical)
        by_x, *sums = F.range_sums(grad, value, range_, drawn)
        flat = F.Range(*(t.reshape(-1) for t in range_))
        return by_x.to(x.dtype), *F.range_gradients(flat, grid, *sums)
    packed = backend.packed_range(boundary)
    residuals = backend.residuals_of(value, axis, packed) if empirical else None
    found = backend.backward(grad, value, Kept.INPUT, axis, packed, grid, key, residuals)
    return found[0].to(x.dtype), *found[1:]


def hard_quantize(x: Tensor, boundary: Boundary) -> Tensor:
    """`x`, of any floating-point dtype, rounded to its grid; gradients straight through."""
    backend = backend_for(x, boundary)
    if backend is not None:
        return quantize(backend, noise.dense(x), boundary)
    return F.hard_quantize(_wide(x), boundary.range(x.dim())).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """bfloat16 and float16 cannot hold grids above 8 bits."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
