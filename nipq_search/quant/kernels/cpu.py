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
from nipq_search.quant.kernels.build import SWITCH, library
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
        ("codes", ctypes.c_void_p),
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
    """Whether there are kernels for `x`: plain float32 tensors on a CPU, outside of traces.

    A tensor of no elements, a subclass (as in export), torch.compile, torch.jit.trace, torch.func
    and everything that watches or fakes single operations take the eager path.
    """
    return (
        x.device.type == "cpu"
        and x.dtype is torch.float32
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.numel() > 0
        and not x.is_neg()
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and library() is not None
    )


def serves(x: Tensor, boundary: Boundary) -> bool:
    """Whether the kernels can quantize `x`."""
    return boundary.alpha.dtype is torch.float32 and available(x)


def plain(tensor: Tensor, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`tensor` as memory in this layout: gradients and saved tensors come in any other as well."""
    if torch._C._functorch.is_legacy_batchedtensor(tensor):
        raise RuntimeError(
            f"vectorized gradients do not go through the fast kernels: set {SWITCH}=eager"
        )
    special = tensor.is_neg() or tensor._is_zerotensor() or type(tensor) is not Tensor
    if tensor.stride() == stride and tensor.dtype is dtype and not special:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=dtype).copy_(tensor)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(
    name: str,
    like: Tensor,
    axis: int,
    range_: Range,
    noise: _Noise,
    *,
    x: Tensor | None = None,
    grad: Tensor | None = None,
    codes: Tensor | None = None,
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
        _pointer(x),
        _pointer(grad),
        out.data_ptr(),
        _pointer(codes),
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


class _Quantize(torch.autograd.Function):
    """Either quantizer: with a key the noisy one, without the rounding one.

    For the backward the noisy one keeps its output, which the next layer keeps anyway, and the
    rounding one 16 bits for each element: so the input need not live on. A leaf, as a weight is,
    lives on in any case and is kept in place of the bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        bits: Tensor,
        boundary: Boundary,
        key: int | None,
        empirical: bool,
        keep: bool,
    ) -> Tensor:
        range_ = quantization_range(alpha, bits, boundary.grid, boundary.minimum)
        residuals = residuals_of(x, *range_[:3], boundary.axis) if empirical else None
        codes = None
        if keep and key is None:
            codes = torch.empty_like(x, dtype=torch.int16)
        noise = _noise(key, residuals)
        y = _run("nipq_forward", x, boundary.axis, range_, noise, x=x, codes=codes)
        ctx.grid, ctx.axis, ctx.key, ctx.stride = boundary.grid, boundary.axis, key, x.stride()
        kept = y if key is not None else (x if codes is None else codes)
        ctx.save_for_backward(kept, *range_, *(residuals or ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kept, *saved = ctx.saved_tensors
        range_ = Range(*saved[:5])
        residuals = Residuals(*saved[5:]) if saved[5:] else None
        kept = plain(kept.detach(), ctx.stride, kept.dtype)
        grad = plain(grads[0], ctx.stride, torch.float32)
        channels = range_.step.numel()
        pieces = -(-grad.numel() // _PIECE) if channels == 1 else channels
        sums = torch.empty(pieces, 3, dtype=torch.float64)
        source = {"codes" if kept.dtype is torch.int16 else "x": kept}
        noise = _noise(ctx.key, residuals)
        grad_x = _run(
            "nipq_backward", grad, ctx.axis, range_, noise, grad=grad, sums=sums, **source
        )
        if channels == 1:
            sums = sums.sum(0, keepdim=True)
        found = sums.to(torch.float32).unbind(1)
        return grad_x, *range_gradients(range_, ctx.grid, *found), None, None, None, None


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
    keep = torch.is_grad_enabled() and x.grad_fn is not None
    return _Quantize.apply(  # type: ignore[no-any-return]
        x, boundary.alpha, boundary.bits, boundary, key, empirical, keep
    )
