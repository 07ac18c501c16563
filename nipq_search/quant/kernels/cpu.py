"""The quantizers' arithmetic in C: one pass over memory forward, one backward (see cpu.c).

The noise is not kept for the backward but computed again from its key.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nipq_search.quant.functional import Range
from nipq_search.quant.kernels.build import library
from nipq_search.quant.noise import Residuals, inner_size

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


class Law(NamedTuple):
    """Where noise comes from: a key, and residuals where it is drawn from those."""

    key: int | None = None
    residuals: Residuals | None = None

    def as_struct(self) -> _Noise:
        """As the kernels take it."""
        if self.key is None:
            return _Noise(law=_ROUNDING)
        halves = self.key & 0xFFFFFFFF, (self.key >> 32) & 0xFFFFFFFF
        if self.residuals is None:
            return _Noise(_UNIFORM, *halves)
        table, count = self.residuals
        return _Noise(_TABLE, *halves, table.data_ptr(), int(count))


def serves(x: Tensor, range_: Range) -> bool:
    """Whether the kernels can compute on `x`: plain float32 tensors on a CPU, outside of traces.

    A tensor of no elements, a subclass (as in export), torch.compile, torch.jit.trace and torch.func
    all take the eager path.
    """
    return (
        x.device.type == "cpu"
        and x.dtype is torch.float32
        and type(x) in (Tensor, torch.nn.Parameter)
        and range_.step.dtype is torch.float32
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        and torch._C._functorch.peek_interpreter_stack() is None
        and library() is not None
    )


def _call(
    name: str,
    law: Law,
    x: Tensor,
    grad: Tensor | None,
    scalars: tuple[Tensor, Tensor, Tensor],
    sums: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(x)
    channels = scalars[0].numel()
    # Boundaries of a bit-width's own shape serve all channels alike.
    step, low, high = (
        t.detach().expand_as(scalars[0]).reshape(-1).contiguous() for t in scalars
    )
    call = _Call(
        x=x.data_ptr(),
        g=None if grad is None else grad.data_ptr(),
        out=out.data_ptr(),
        count=x.numel(),
        channels=channels,
        inner=inner_size(x, scalars[0]),
        step=step.data_ptr(),
        low=low.data_ptr(),
        high=high.data_ptr(),
        sums=None if sums is None else sums.data_ptr(),
        noise=law.as_struct(),
        threads=torch.get_num_threads(),
    )
    getattr(library(), name)(ctypes.byref(call))
    return out


class _Quantize(torch.autograd.Function):
    """Either quantizer: with a key the noisy one, without the rounding one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        low: Tensor,
        high: Tensor,
        lowest: Tensor,
        highest: Tensor,
        law: Law,
    ) -> Tensor:
        ctx.law = law
        ctx.save_for_backward(x, step, low, high)
        bounds = (lowest, highest) if law.key is None else (low, high)
        return _call("nipq_forward", law, x, None, (step, *bounds))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, step, low, high = ctx.saved_tensors
        grad = grads[0]
        if grad.stride() != x.stride() or grad.dtype is not x.dtype:
            grad = torch.empty_like(x).copy_(grad)
        channels = step.numel()
        pieces = -(-x.numel() // _PIECE) if channels == 1 else channels
        sums = torch.empty(pieces, 3, dtype=torch.float64)
        grad_x = _call("nipq_backward", ctx.law, x, grad, (step, low, high), sums)
        if channels == 1:
            sums = sums.sum(0, keepdim=True)
        found = (
            part.to(step.dtype).reshape(step.shape).sum_to_size(like.shape)
            for part, like in zip(sums.unbind(1), (step, low, high), strict=True)
        )
        return grad_x, *found, None, None, None


def quantize(x: Tensor, range_: Range, law: Law) -> Tensor:
    """What `functional.pseudo_quantize` and `hard_quantize` compute, for tensors it `serves`."""
    return _Quantize.apply(x, *range_, law)  # type: ignore[no-any-return]
