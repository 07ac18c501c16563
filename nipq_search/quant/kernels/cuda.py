"""GPU backend of the quantizers in Triton, with the same noise as cpu.c.

Each program processes BLOCK adjacent elements or, in a backward pass with several boundaries, one
channel. Float32 sums therefore have a fixed order. No function synchronizes the device. This
module implements the `Backend` protocol.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from nipq_search.quant.kernels.build import SWITCH, switched_off
from nipq_search.quant.kernels.kept import Kept
from nipq_search.quant.numerics import noise
from nipq_search.quant.numerics.functional import (
    Boundary,
    Grid,
    Range,
    quantization_range,
    range_gradients,
)
from nipq_search.quant.numerics.noise import Residuals, inner_size, is_plain, signed

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch do not include Triton
    triton = None

_BLOCK = 1024
_ROUNDING, _UNIFORM, _TABLE = range(3)


def available(x: Tensor) -> bool:
    """Whether the kernels support `x` and run on its device."""
    return is_plain(x) and x.numel() < 1 << 31 and not switched_off() and _works(x.device)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether Triton can launch kernels; it needs a C compiler and a supported GPU."""
    if triton is None:
        return False
    try:
        one = torch.ones(1, device=device)
        forward(one, 0, one.expand(5, 1).contiguous(), 1, None)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            "quantizers run without their fast kernels and are several times slower: Triton fails "
            f"with {type(error).__name__}: {reason}. Set {SWITCH}=eager to silence this warning",
            stacklevel=2,
        )
        return False
    return True


if triton is not None:
    # Keys change at every step, so kernels are not specialized for keys divisible by 16.
    _jit = functools.partial(triton.jit, do_not_specialize=["first", "second", "origin"])

    @triton.jit
    def _rounded(x):  # type: ignore[no-untyped-def]
        """Round half to even, for |x| < 2^22."""
        return (x + 12582912.0) - 12582912.0

    @triton.jit  # type: ignore[untyped-decorator,unused-ignore]
    def _noise(  # type: ignore[no-untyped-def]
        at, first, second, origin, table, used, LAW: tl.constexpr
    ):
        """Return noise from a hash of the element's position; see `noise._hashed`."""
        element = (at.to(tl.uint32) + origin.to(tl.uint32)).to(tl.uint32)
        place = element if LAW == 1 else element // 16
        h = place ^ first.to(tl.uint32)
        h = h ^ (h >> 16)
        h = (h * 0x85EBCA6B).to(tl.uint32)
        h = h ^ (h >> 13)
        h = (h + second.to(tl.uint32)).to(tl.uint32)
        h = (h * 0xC2B2AE35).to(tl.uint32)
        h = h ^ (h >> 16)
        if LAW == 1:
            signed = h.to(tl.int32, bitcast=True) >> 8
            return (signed.to(tl.float32) + 0.5) * 5.9604644775390625e-08
        start = (h.to(tl.uint64) * tl.load(used).to(tl.uint64)) >> 32
        return tl.load(table + start.to(tl.int64) + (element % 16).to(tl.int64))

    @_jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        y_ptr,
        range_ptr,
        table_ptr,
        used_ptr,
        first,
        second,
        origin,
        count,
        channels,
        inner,
        LAW: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        here = at < count
        channel = (at // inner) % channels
        x = tl.load(x_ptr + at, mask=here, other=0.0)
        step = tl.load(range_ptr + channel)
        low = tl.load(range_ptr + channels + channel)
        high = tl.load(range_ptr + 2 * channels + channel)
        above = x >= high
        below = x <= low
        if LAW == 0:
            scaled = tl.math.div_rn(x, step)
            lowest = tl.load(range_ptr + 3 * channels + channel)
            highest = tl.load(range_ptr + 4 * channels + channel)
            inside = tl.where(scaled < lowest, lowest, scaled)
            inside = tl.where(inside > highest, highest, inside)
            y = _rounded(inside) * step
        else:
            y = x + _noise(at, first, second, origin, table_ptr, used_ptr, LAW) * step
            moved = (y.to(tl.int32, bitcast=True) ^ 1).to(tl.float32, bitcast=True)
            y = tl.where((y == high) | (y == low), moved, y)
            y = tl.where(above, high, y)
            y = tl.where(below, low, y)
        tl.store(y_ptr + at, y, mask=here)

    @triton.jit
    def _derivatives(  # type: ignore[no-untyped-def]
        kept_ptr, at, here, g, step, low, high, table, used, first, second, origin, LAW, KEPT
    ):
        """Return the gradient with respect to x and per-element contributions to the others.

        The other gradients are those with respect to step, low and high.
        """
        kept = tl.load(kept_ptr + at, mask=here, other=0.0)
        if KEPT == 0:
            above = kept >= high
            below = kept <= low
        else:
            above = kept == high
            below = kept == low
        if LAW == 0:
            scaled = tl.math.div_rn(kept, step)
            noise = _rounded(scaled) - scaled
        else:
            noise = _noise(at, first, second, origin, table, used, LAW)
        outside = above | below
        return (
            tl.where(outside, 0.0, g),
            tl.where(outside, 0.0, g * noise),
            tl.where(below, g, 0.0),
            tl.where(above, g, 0.0),
        )

    @_jit
    def _tensor_backward_kernel(  # type: ignore[no-untyped-def]
        grad_ptr,
        kept_ptr,
        out_ptr,
        sums_ptr,
        range_ptr,
        table_ptr,
        used_ptr,
        first,
        second,
        origin,
        count,
        LAW: tl.constexpr,
        KEPT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        piece = tl.program_id(0)
        at = piece * BLOCK + tl.arange(0, BLOCK)
        here = at < count
        g = tl.load(grad_ptr + at, mask=here, other=0.0)
        out, d_step, d_low, d_high = _derivatives(
            kept_ptr,
            at,
            here,
            g,
            tl.load(range_ptr),
            tl.load(range_ptr + 1),
            tl.load(range_ptr + 2),
            table_ptr,
            used_ptr,
            first,
            second,
            origin,
            LAW,
            KEPT,
        )
        tl.store(out_ptr + at, out, mask=here)
        tl.store(sums_ptr + 3 * piece, tl.sum(d_step, axis=0))
        tl.store(sums_ptr + 3 * piece + 1, tl.sum(d_low, axis=0))
        tl.store(sums_ptr + 3 * piece + 2, tl.sum(d_high, axis=0))

    @_jit
    def _channel_backward_kernel(  # type: ignore[no-untyped-def]
        grad_ptr,
        kept_ptr,
        out_ptr,
        sums_ptr,
        range_ptr,
        table_ptr,
        used_ptr,
        first,
        second,
        origin,
        count,
        channels,
        inner,
        LAW: tl.constexpr,
        KEPT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        channel = tl.program_id(0)
        step = tl.load(range_ptr + channel)
        low = tl.load(range_ptr + channels + channel)
        high = tl.load(range_ptr + 2 * channels + channel)
        own = count // channels
        total_step = tl.zeros((BLOCK,), dtype=tl.float32)
        total_low = tl.zeros((BLOCK,), dtype=tl.float32)
        total_high = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, own, BLOCK):
            place = start + tl.arange(0, BLOCK)
            here = place < own
            at = ((place // inner) * channels + channel) * inner + place % inner
            g = tl.load(grad_ptr + at, mask=here, other=0.0)
            out, d_step, d_low, d_high = _derivatives(
                kept_ptr,
                at,
                here,
                g,
                step,
                low,
                high,
                table_ptr,
                used_ptr,
                first,
                second,
                origin,
                LAW,
                KEPT,
            )
            tl.store(out_ptr + at, out, mask=here)
            total_step += d_step
            total_low += d_low
            total_high += d_high
        tl.store(sums_ptr + 3 * channel, tl.sum(total_step, axis=0))
        tl.store(sums_ptr + 3 * channel + 1, tl.sum(total_low, axis=0))
        tl.store(sums_ptr + 3 * channel + 2, tl.sum(total_high, axis=0))


def _law(key: int | None, residuals: Residuals | None) -> int:
    """Return the code of the noise distribution in the kernels."""
    if key is None:
        return _ROUNDING
    return _UNIFORM if residuals is None else _TABLE


def _noise_arguments(
    key: int | None, residuals: Residuals | None, other: Tensor
) -> tuple[Tensor, Tensor, int, int, int]:
    """Return the table, its used length, both halves of the key, and the low half of the origin.

    The high half of the origin is added to the key, so beyond 2^32 elements per batch, the noise
    differs from that of the other backends. Without a table, `other` takes the place of both
    tensors.
    """
    word = key or 0
    origin = noise.origin_of(word)
    table, used = residuals or (other, other)
    # Signed 32-bit values, because Triton would compile another kernel for other integer types.
    second = signed((word >> 32) + (origin >> 32), 32)
    return table, used, signed(word, 32), second, signed(origin, 32)


def _launch(kernel: Any, programs: int, *given: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor; Triton would use the current device."""
    with torch.cuda.device_of(given[0]):  # type: ignore[no-untyped-call]
        # Fused multiply-add would round differently from cpu.c.
        kernel[(programs,)](*given, **constants, enable_fp_fusion=False)


def packed_range(boundary: Boundary) -> Tensor:
    """Return the range of a boundary as a tensor of shape (5, channels); see `Backend`."""
    with torch.no_grad():
        alpha = boundary.alpha.detach()
        range_ = quantization_range(alpha, boundary.bits, boundary.grid, boundary.minimum)
        return torch.stack([t.expand(alpha.numel()) for t in range_])


def residuals_of(x: Tensor, axis: int, range_: Tensor) -> Residuals:
    """Return the rounding residuals of a subsample of `x`; see `Backend`.

    Args:
        x: dense float32 tensor.
        axis: channel dimension.
        range_: packed range.

    Returns:
        The residual table, in units of the step.
    """
    step, low, high = range_[:3].unbind()
    return noise.residuals_of(x, step, low, high, axis)


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
    y, count, channels = torch.empty_like(x), x.numel(), range_.shape[1]
    _launch(
        _forward_kernel,
        triton.cdiv(count, _BLOCK),
        x,
        y,
        range_,
        *_noise_arguments(key, residuals, range_),
        count,
        channels,
        inner_size(x, channels, axis),
        LAW=_law(key, residuals),
        BLOCK=_BLOCK,
    )
    return y


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
    out, count, channels = torch.empty_like(grad), grad.numel(), range_.shape[1]
    programs = triton.cdiv(count, _BLOCK) if channels == 1 else channels
    sums = torch.empty(programs, 3, dtype=torch.float32, device=grad.device)
    given = (grad, kept, out, sums, range_, *_noise_arguments(key, residuals, range_))
    constants = {"LAW": _law(key, residuals), "KEPT": kind.value}
    if channels == 1:
        _launch(_tensor_backward_kernel, programs, *given, count, **constants, BLOCK=_BLOCK)
        sums = sums.sum(0, keepdim=True)
    else:
        inner, block = inner_size(grad, channels, axis), triton.next_power_of_2(count // channels)
        _launch(
            _channel_backward_kernel,
            programs,
            *given,
            count,
            channels,
            inner,
            **constants,
            BLOCK=min(_BLOCK, block),
        )
    return out, *range_gradients(Range(*range_), grid, *sums.unbind(1))
