"""Selection of the fastest backend for a tensor: C on a CPU, Triton on a GPU, otherwise torch."""

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
    """Return the kernels that support `x`, or None if torch operations are required."""
    alpha = boundary.alpha
    if alpha.dtype is not torch.float32 or alpha.device != x.device:
        return None  # torch raises a clear error if the devices differ
    if cpu.available(x):
        return cpu
    if x.is_cuda:
        from nipq_search.quant.kernels import cuda  # deferred because Triton loads slowly

        return cuda if cuda.available(x) else None
    return None


def pseudo_quantize(x: Tensor, boundary: Boundary, key: int, empirical: bool = False) -> Tensor:
    """Add noise one step wide to the elements inside the boundaries, and clip the others.

    Args:
        x: tensor of any shape and floating-point dtype; half precision is computed in float32.
            Noise is assigned to elements in memory order.
        boundary: parameters of the quantization range.
        key: 64 bits that determine the noise, optionally with an origin; see `noise.with_origin`.
        empirical: whether noise is drawn from the tensor's own rounding residuals instead of a
            uniform distribution.

    Returns:
        The noisy tensor, of the shape and dtype of `x`.
    """
    x = noise.dense(x)
    backend = backend_for(x, boundary)
    # Only the C kernels resolve the boundary themselves. Their result may differ from torch's in
    # the last bit, which could move an element across the boundary and shift all later entries of
    # a residual table, so the boundary is resolved by torch for empirical noise.
    if backend is not cpu or empirical:
        boundary = boundary.resolved()
    if backend is not None:
        return quantize(backend, x, boundary, key, empirical)
    value, range_ = _wide(x), boundary.range(x.dim())
    drawn = _noise(value, range_, boundary.axis, key, empirical)
    return F.pseudo_quantize(value, range_, drawn).to(x.dtype)


def _noise(x: Tensor, range_: Range, axis: int, key: int, empirical: bool) -> Tensor:
    """Return noise for a dense tensor, in its memory layout, from torch operations."""
    if empirical:
        drawn = noise.drawn_from(noise.residuals_of(x, *range_[:3], axis), x.shape, key)
    else:
        drawn = noise.uniform_noise(x.shape, key, x.device, x.dtype)
    return drawn.as_strided(x.shape, x.stride())


def gradients(
    grad: Tensor, x: Tensor, boundary: Boundary, key: int, empirical: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `pseudo_quantize` with respect to `x`, boundaries and bit-width.

    Args:
        grad: gradient with respect to the output, same shape as `x`.
        x: see `pseudo_quantize`.
        boundary: parameters of the quantization range, without `start` and `draw`.
        key: see `pseudo_quantize`.
        empirical: see `pseudo_quantize`.

    Returns:
        Gradients with respect to `x`, of its shape, `boundary.alpha`, shape (channels,), and
        `boundary.bits`, shape (1,).
    """
    dense = noise.dense(x)
    value, axis, grid = _wide(dense), boundary.axis, boundary.grid
    grad = plain(grad, value.stride(), value.dtype)
    if (backend := backend_for(dense, boundary)) is None:
        range_ = boundary.range(x.dim())
        drawn = _noise(value, range_, axis, key, empirical)
        grad_x, *sums = F.range_sums(grad, value, range_, drawn)
        flat = F.Range(*(t.reshape(-1) for t in range_))
        return grad_x.to(x.dtype), *F.range_gradients(flat, grid, *sums)
    packed = backend.packed_range(boundary)
    residuals = backend.residuals_of(value, axis, packed) if empirical else None
    found = backend.backward(grad, value, Kept.INPUT, axis, packed, grid, key, residuals)
    return found[0].to(x.dtype), *found[1:]


def hard_quantize(x: Tensor, boundary: Boundary) -> Tensor:
    """Round `x`, of any floating-point dtype, to its grid, with straight-through gradients."""
    backend = backend_for(x, boundary)
    if backend is not None:
        return quantize(backend, noise.dense(x), boundary)
    return F.hard_quantize(_wide(x), boundary.range(x.dim())).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Convert half precision, which cannot represent grids above 8 bits, to float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
