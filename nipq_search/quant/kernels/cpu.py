"""The quantizers' arithmetic in C: one pass over memory forward, one backward (see cpu.c).

It serves as a `Backend`: `forward` and `backward` are the members.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nipq_search.quant.functional import Range
from nipq_search.quant.kernels.build import library
from nipq_search.quant.kernels.kept import Kept
from nipq_search.quant.noise import Residuals, inner_size, is_plain

_PIECE = 32768  # as in cpu.c, which a test compares
_ROUNDING, _UNIFORM, _TABLE = range(3)


class _Noise(ctypes.Structure):
    _fields_ = (
        ("law", ctypes.c_int),
        ("first", ctypes.c_uint32),
        ("second", ctypes.c_uint32),
        ("table", ctypes.c_void_p),
        ("count", ctypes.c_int64),
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
        ("step", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("lowest", ctypes.c_void_p),
        ("highest", ctypes.c_void_p),
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
        return _Noise(_UNIFORM, *halves)
    return _Noise(_TABLE, *halves, residuals.table.data_ptr(), int(residuals.used))


def available(x: Tensor) -> bool:
    """Whether there are kernels for `x`."""
    return x.device.type == "cpu" and is_plain(x) and library() is not None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(
    name: str,
    like: Tensor,
    axis: int,
    range_: Range,
    noise: _Noise,
    kept: Kept,
    *,
    x: Tensor,
    grad: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """Call a kernel and return what it made, laid out as `like`. See `Call` in cpu.c."""
    out = torch.empty_like(like)
    channels = range_.step.numel()
    # The ends of some grids are the same for all channels, and have shape (1,).
    scalars = [
        t if t.numel() == channels and t.is_contiguous() else t.expand(channels).contiguous()
        for t in range_
    ]
    call = _Call(
        x.data_ptr(),
        _pointer(grad),
        out.data_ptr(),
        kept.value,
        like.numel(),
        channels,
        inner_size(like, channels, axis),
        *(t.data_ptr() for t in scalars),
        _pointer(sums),
        noise,
        torch.get_num_threads(),
    )
    getattr(library(), name)(ctypes.byref(call))
    return out


def forward(
    x: Tensor,
    axis: int,
    range_: Range,
    key: int | None,
    residuals: Residuals | None,
) -> Tensor:
    """See `Backend`."""
    noise = _noise(key, residuals)
    return _run("nipq_forward", x, axis, range_, noise, Kept.INPUT, x=x)


def backward(
    grad: Tensor,
    kept: Tensor,
    kind: Kept,
    axis: int,
    range_: Range,
    key: int | None,
    residuals: Residuals | None,
) -> tuple[Tensor, Tensor]:
    """See `Backend`."""
    channels = range_.step.numel()
    pieces = -(-grad.numel() // _PIECE) if channels == 1 else channels
    sums = torch.empty(pieces, 3, dtype=torch.float64)
    noise = _noise(key, residuals)
    grad_x = _run("nipq_backward", grad, axis, range_, noise, kind, x=kept, grad=grad, sums=sums)
    return grad_x, sums.sum(0, keepdim=True) if channels == 1 else sums
