"""The quantizers' arithmetic in C: one pass over memory forward, one backward (see cpu.c).

The noise is not kept for the backward but computed again from its key.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nipq_search.quant.functional import Boundary, Range, quantization_range, range_gradients
from nipq_search.quant.kernels.build import library
from nipq_search.quant.noise import Residuals, inner_size, residuals_of

_PIECE = 32768  # as in cpu.c
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
        ("count", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("step", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
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


def serves(x: Tensor, boundary: Boundary) -> bool:
    """Whether the kernels can compute on `x`: plain float32 tensors on a CPU, outside of traces.

    A tensor of no elements, a subclass (as in export), torch.compile, torch.jit.trace and
    torch.func take the eager path.
    """
    return (
        x.device.type == "cpu"
        and x.dtype is torch.float32
        and type(x) in (Tensor, torch.nn.Parameter)
        and boundary.alpha.dtype is torch.float32
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and library() is not None
    )


def _run(
    name: str,
    x: Tensor,
    grad: Tensor | None,
    axis: int,
    scalars: tuple[Tensor, Tensor, Tensor],
    sums: Tensor | None,
    noise: _Noise,
) -> Tensor:
    """Call a kernel: `scalars` are the step and both ends, in float32, of shape (channels,)."""
    out = torch.empty_like(x)
    channels = scalars[0].numel()
    # The ends of some grids are the same for all channels, and have shape (1,).
    step, low, high = (
        t if t.numel() == channels and t.is_contiguous() else t.expand(channels).contiguous()
        for t in scalars
    )
    call = _Call(
        x.data_ptr(),
        None if grad is None else grad.data_ptr(),
        out.data_ptr(),
        x.numel(),
        channels,
        inner_size(x, channels, axis),
        step.data_ptr(),
        low.data_ptr(),
        high.data_ptr(),
        None if sums is None else sums.data_ptr(),
        noise,
        torch.get_num_threads(),
    )
    getattr(library(), name)(ctypes.byref(call))
    return out


class _Quantize(torch.autograd.Function):
    """Either quantizer: with a key the noisy one, without the rounding one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        bits: Tensor,
        boundary: Boundary,
        key: int | None,
        empirical: bool,
    ) -> Tensor:
        range_ = quantization_range(alpha, bits, boundary.grid, boundary.minimum)
        step, low, high, lowest, highest = range_
        residuals = residuals_of(x, step, low, high, boundary.axis) if empirical else None
        ctx.save_for_backward(x, *range_, *(residuals or ()))
        ctx.grid, ctx.axis, ctx.key = boundary.grid, boundary.axis, key
        scalars = (step, lowest, highest) if key is None else (step, low, high)
        noise = _noise(key, residuals)
        return _run("nipq_forward", x, None, ctx.axis, scalars, None, noise)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *saved = ctx.saved_tensors
        range_ = Range(*saved[:5])
        residuals = Residuals(*saved[5:]) if saved[5:] else None
        grad = grads[0]
        if grad.stride() != x.stride() or grad.dtype is not x.dtype:
            grad = torch.empty_like(x).copy_(grad)
        channels = range_.step.numel()
        pieces = -(-x.numel() // _PIECE) if channels == 1 else channels
        sums = torch.empty(pieces, 3, dtype=torch.float64)
        noise = _noise(ctx.key, residuals)
        grad_x = _run("nipq_backward", x, grad, ctx.axis, range_[:3], sums, noise)
        if channels == 1:
            sums = sums.sum(0, keepdim=True)
        found = sums.to(torch.float32).unbind(1)
        return grad_x, *range_gradients(range_, ctx.grid, *found), None, None, None


def quantize(
    x: Tensor, boundary: Boundary, key: int | None = None, empirical: bool = False
) -> Tensor:
    """What `functional.pseudo_quantize` and `hard_quantize` compute, for a dense `x` it `serves`.

    Args:
        x: the tensor.
        boundary: what determines its range.
        key: of the noise; None rounds.
        empirical: noise from the tensor's own residuals.
    """
    return _Quantize.apply(x, boundary.alpha, boundary.bits, boundary, key, empirical)  # type: ignore[no-any-return]
