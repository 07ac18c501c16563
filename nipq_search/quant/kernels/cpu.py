"""The quantizers' arithmetic in C: one pass over memory forward, one backward (see cpu.c).

It serves as a `Backend`: `forward` and `backward` are the members.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nipq_search.quant.kernels.build import library
from nipq_search.quant.kernels.kept import Kept
from nipq_search.quant.numerics.functional import Boundary, Grid
from nipq_search.quant.numerics.noise import (
    GROUP,
    Residuals,
    inner_size,
    is_plain,
    origin_of,
    sample_of,
)

_PIECE = 32768  # as in cpu.c, which a test compares
_ROUNDING, _UNIFORM, _TABLE = range(3)
_GRIDS = (Grid.SIGNED, Grid.UNSIGNED, Grid.AFFINE)


class _Noise(ctypes.Structure):
    _fields_ = (
        ("law", ctypes.c_int),
        ("first", ctypes.c_uint32),
        ("second", ctypes.c_uint32),
        ("table", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("origin", ctypes.c_int64),
    )


class _Call(ctypes.Structure):
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
    """Where noise comes from: a key, and residuals where it is drawn from those."""
    if key is None:
        return _Noise(law=_ROUNDING)
    halves = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    if residuals is None:
        return _Noise(_UNIFORM, *halves, origin=origin_of(key))
    table, used = residuals.table.data_ptr(), int(residuals.used)
    return _Noise(_TABLE, *halves, table, used, origin_of(key))


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for C, whatever torch's default dtype and device are."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def available(x: Tensor) -> bool:
    """Whether there are kernels for `x`."""
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
    """Call a kernel and return what it made, laid out as `x`. See `Call` in cpu.c."""
    out = torch.empty_like(x)
    channels = range_.shape[1]
    call = _Call(
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
    """See `Backend`."""
    alpha = boundary.alpha.detach().contiguous()
    start = None if boundary.start is None else boundary.start.contiguous()
    range_ = _empty(6, alpha.numel())
    library().nipq_range(  # type: ignore[union-attr]
        alpha.data_ptr(),
        None if start is None else start.data_ptr(),
        boundary.bits.item() if boundary.draw is None else float(boundary.draw.width),
        boundary.minimum.item(),
        _GRIDS.index(boundary.grid),
        alpha.numel(),
        range_.data_ptr(),
    )
    return range_


def residuals_of(x: Tensor, axis: int, range_: Tensor) -> Residuals:
    """See `Backend`."""
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
    """See `Backend`."""
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
    """See `Backend`."""
    channels = range_.shape[1]
    pieces = -(-grad.numel() // _PIECE) if channels == 1 else channels
    sums = _empty(pieces, 3, dtype=torch.float64)
    noise = _noise(key, residuals)
    grad_x = _run("nipq_backward", kept, axis, range_, noise, kind, grad, sums)
    grad_alpha, grad_bits = _empty(channels), _empty(1)
    library().nipq_range_gradients(  # type: ignore[union-attr]
        range_.data_ptr(),
        _GRIDS.index(grid),
        channels,
        sums.data_ptr(),
        pieces,
        grad_alpha.data_ptr(),
        grad_bits.data_ptr(),
    )
    return grad_x, grad_alpha, grad_bits
