"""CPU backend of the quantizers in C, with one pass over memory per direction (see cpu.c).

This module implements the `Backend` protocol.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nipq_search.quant.kernels.build import library
from nipq_search.quant.kernels.kept import Kept
from nipq_search.quant.numerics.functional import GRID_CODES, Boundary, Grid
from nipq_search.quant.numerics.noise import (
    GROUP,
    Residuals,
    inner_size,
    is_plain,
    origin_of,
    sample_of,
)

_PIECE = 32768  # must equal PIECE in cpu.c; a test compares them
_ROUNDING, _UNIFORM, _TABLE = range(3)  # codes of the noise distributions in cpu.c


class _Noise(ctypes.Structure):
    """The struct `Noise` of cpu.c."""

    _fields_ = (
        ("law", ctypes.c_int),
        ("first", ctypes.c_uint32),
        ("second", ctypes.c_uint32),
        ("table", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("origin", ctypes.c_int64),
    )


class _KernelCall(ctypes.Structure):
    """The struct `Call` of cpu.c."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("kept", ctypes.c_int),
        ("count", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("range", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("noise", _Noise),
        ("threads", ctypes.c_int),
    )


def _noise(key: int | None, residuals: Residuals | None) -> _Noise:
    """Return the struct that selects rounding, uniform noise or residuals in a kernel."""
    if key is None:
        return _Noise(law=_ROUNDING)
    halves = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    if residuals is None:
        return _Noise(_UNIFORM, *halves, origin=origin_of(key))
    table, used = residuals.table.data_ptr(), int(residuals.used)
    return _Noise(_TABLE, *halves, table, used, origin_of(key))


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate a CPU tensor for C, regardless of torch's default dtype and device."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def available(x: Tensor) -> bool:
    """Whether the kernels support `x` and could be built."""
    return x.device.type == "cpu" and is_plain(x) and library() is not None


def _run(
    name: str,
    x: Tensor,
    axis: int,
    range_: Tensor,
    noise: _Noise,
    kept: Kept = Kept.INPUT,
    grad: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """Call a kernel and return its result in the layout of `x`; see `Call` in cpu.c."""
    out = torch.empty_like(x)
    channels = range_.shape[1]
    call = _KernelCall(
        x.data_ptr(),
        None if grad is None else grad.data_ptr(),
        out.data_ptr(),
        kept.value,
        x.numel(),
        channels,
        inner_size(x, channels, axis),
        range_.data_ptr(),
        None if sums is None else sums.data_ptr(),
        noise,
        torch.get_num_threads(),
    )
    getattr(library(), name)(ctypes.byref(call))
    return out


def packed_range(boundary: Boundary) -> Tensor:
    """Return the range of a boundary as a tensor of shape (6, channels); see `Backend`.

    The last row contains the derivative of the boundary with respect to its learned parameter.
    """
    alpha = boundary.alpha.detach().contiguous()
    start = None if boundary.start is None else boundary.start.contiguous()
    range_ = _empty(6, alpha.numel())
    library().nipq_range(  # type: ignore[union-attr]
        alpha.data_ptr(),
        None if start is None else start.data_ptr(),
        boundary.bits.item() if boundary.draw is None else float(boundary.draw.width),
        boundary.minimum.item(),
        GRID_CODES.index(boundary.grid),
        alpha.numel(),
        range_.data_ptr(),
    )
    return range_


def residuals_of(x: Tensor, axis: int, range_: Tensor) -> Residuals:
    """Return the rounding residuals of a subsample of `x`; see `Backend`.

    Args:
        x: dense float32 tensor.
        axis: channel dimension.
        range_: packed range.

    Returns:
        The residual table, in units of the step.
    """
    stride, order = sample_of(x)
    channels, sampled = range_.shape[1], len(order)
    scratch, table = _empty(sampled), _empty(sampled + GROUP)
    used = library().nipq_residuals(  # type: ignore[union-attr]
        x.data_ptr(),
        stride,
        sampled,
        channels,
        inner_size(x, channels, axis),
        range_.data_ptr(),
        order.data_ptr(),
        scratch.data_ptr(),
        table.data_ptr(),
        torch.get_num_threads(),
    )
    return Residuals(table, torch.tensor(used, device="cpu"))


def forward(
    x: Tensor, axis: int, range_: Tensor, key: int | None, residuals: Residuals | None
) -> Tensor:
    """Return the quantized tensor; see `Backend`.

    Args:
        x: dense float32 tensor.
        axis: channel dimension.
        range_: packed range.
        key: key of the noise; None selects rounding.
        residuals: table from which noise is drawn; None for uniform noise.

    Returns:
        A float32 tensor in the layout of `x`.
    """
    return _run("nipq_forward", x, axis, range_, _noise(key, residuals))


def backward(
    grad: Tensor,
    kept: Tensor,
    kind: Kept,
    axis: int,
    range_: Tensor,
    grid: Grid,
    key: int | None,
    residuals: Residuals | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to the input, boundaries and bit-width; see `Backend`.

    Args:
        grad: gradient with respect to the output.
        kept: input of the forward pass or, if a key is given, possibly its output.
        kind: whether `kept` is the input or the output.
        axis: channel dimension.
        range_: packed range.
        grid: type of the grid.
        key: key of the noise; None selects rounding.
        residuals: table from which noise was drawn; None for uniform noise.

    Returns:
        The three gradients, of the shape of the input, (channels,) and (1,).
    """
    channels = range_.shape[1]
    pieces = -(-grad.numel() // _PIECE) if channels == 1 else channels
    sums = _empty(pieces, 3, dtype=torch.float64)
    noise = _noise(key, residuals)
    grad_x = _run("nipq_backward", kept, axis, range_, noise, kind, grad, sums)
    grad_alpha, grad_bits = _empty(channels), _empty(1)
    library().nipq_range_gradients(  # type: ignore[union-attr]
        range_.data_ptr(),
        GRID_CODES.index(grid),
        channels,
        sums.data_ptr(),
        pieces,
        grad_alpha.data_ptr(),
        grad_bits.data_ptr(),
    )
    return grad_x, grad_alpha, grad_bits
