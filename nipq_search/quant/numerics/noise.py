"""Pseudo-quantization noise as a pure function of (seed, step, tensor, element).

The functions do not use torch's global generator, so a trial that is resumed or replayed on
another machine reproduces the same noise. The noise of an element is a hash of the key and the
element's position in memory or, if it is empirical, the entry that such a hash selects from a
table of rounding residuals. The fast kernels compute the same numbers in registers, once in the
forward pass and again in the backward pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._compile import _disable_dynamo

Function = TypeVar("Function", bound=Callable[..., Any])

_TABLE_ENTRIES = 1 << 17
"""Largest number of elements from which the residual table of a large tensor is built."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MASK = (1 << 64) - 1


def not_compiled(function: Function) -> Function:
    """Exclude `function` from torch.compile, because noise depends on the step number.

    Equivalent to `torch.compiler.disable`, but does not load the compiler at import time, which
    takes about a second.
    """
    return _disable_dynamo(function)  # type: ignore[return-value]


def mix(*words: int) -> int:
    """Hash integers to 64 bits with the chained finalizer of splitmix64."""
    state = 0
    for word in words:
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def with_origin(key: int, origin: int) -> int:
    """Return the noise key of a slice that starts at element `origin` of a larger tensor.

    The slice receives the same noise as within the larger tensor. The origin is stored above the
    64 bits of the key.
    """
    return key | origin << 64


def origin_of(key: int) -> int:
    """Return the origin that a noise key contains, or 0; see `with_origin`."""
    return key >> 64


def centered_uniform(*words: int) -> float:
    """Return a uniform random number from the open interval (-1/2, 1/2), determined by `words`."""
    return ((mix(*words) >> 12) + 0.5) / (1 << 52) - 0.5


def dense(x: Tensor) -> Tensor:
    """Return `x` if it is dense, otherwise a contiguous copy.

    The elements of a dense tensor fill one block of memory, with its dimensions in any order.
    """
    if x.is_contiguous():
        return x
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return x.contiguous()
        expected *= size
    return x


def is_plain(x: Tensor) -> bool:
    """Whether the C and Triton kernels may process `x`.

    They support float32, bfloat16 and float16. Empty tensors, tensor subclasses (as in export),
    negated views, torch.compile, torch.jit.trace, functorch transforms and dispatch modes require
    torch operations.
    """
    # The private names below detect torch.jit.trace, functorch transforms and dispatch modes.
    return (
        not torch.compiler.is_compiling()
        and x.dtype in _DTYPES
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.numel() > 0
        and not x.is_neg()
        and not torch._C._is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


def inner_size(x: Tensor, channels: int, axis: int) -> int:
    """Return the number of adjacent elements of a dense `x` that share a boundary.

    Element p, in memory order, belongs to channel `(p // inner_size) % channels`.

    Args:
        x: dense tensor.
        channels: number of boundaries.
        axis: channel dimension.

    Returns:
        The stride of `axis`, or the number of elements if there is a single boundary.
    """
    return int(x.stride(axis)) if channels > 1 else max(1, x.numel())


def signed(word: int, bits: int) -> int:
    """Return the low `bits` bits of a word as a signed integer."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def _hashed(count: int, key: int, device: torch.device) -> Tensor:
    """Return 32 hash bits (int32) for each of `count` elements, from MurmurHash3's finalizer.

    One half of the key is mixed in before the first multiplication, the other half before the
    second. The 32-bit multiplications wrap around, as they do in the kernels.
    """
    with torch.no_grad():
        origin = origin_of(key)
        place = torch.arange(origin, origin + count, device=device, dtype=torch.int64)
        h = place.to(torch.int32).bitwise_xor_(signed(key, 32))
        h ^= (h >> 16) & 0xFFFF
        h *= signed(0x85EBCA6B, 32)
        h ^= (h >> 13) & 0x7FFFF
        h += signed(key >> 32, 32)
        if origin + count > 1 << 32:
            h += (place >> 32).to(torch.int32)
        h *= signed(0xC2B2AE35, 32)
        h ^= (h >> 16) & 0xFFFF
        return h


def uniform_noise(shape: torch.Size, key: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return noise that is uniform on (-1/2, 1/2).

    Its values are the odd multiples of 2^-25, which float32 represents exactly.

    Args:
        shape: shape of the result.
        key: 64 bits from `mix`, optionally with an origin; equal keys give equal noise.
        device: device of the result.
        dtype: float32 or float64.

    Returns:
        Noise in units of the step.
    """
    bits = _hashed(shape.numel(), key, device) >> 8
    return bits.to(dtype).add_(0.5).mul_(2.0**-24).view(shape)


GROUP = 16
"""Number of adjacent elements that receive adjacent entries of a residual table."""


class Residuals(NamedTuple):
    """Rounding residuals of a subsample of a tensor.

    Attributes:
        table: residuals; the first `GROUP - 1` used ones are repeated after the last, so that a
            group never wraps around.
        used: number of entries from which noise is drawn, a scalar tensor.
    """

    table: Tensor
    used: Tensor


def _stride(count: int) -> int:
    """Return the distance between the elements from which a residual table is built."""
    stride = 1 if count <= 2 * _TABLE_ENTRIES else -(-count // _TABLE_ENTRIES)
    # A stride that shares a factor with the shape would skip some channels or columns.
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


@functools.lru_cache(maxsize=32)
def _shuffle(count: int, device: torch.device) -> Tensor:
    """Return a fixed random permutation of `count` elements, the order of a residual table.

    The table must be shuffled, because adjacent elements may have similar residuals, and adjacent
    entries are drawn together.
    """
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(count)
        return torch.randperm(count, generator=generator).to(device)


def sample_of(x: Tensor) -> tuple[int, Tensor]:
    """Return the stride at which a residual table samples `x`, and the order of its entries."""
    stride = _stride(x.numel())
    return stride, _shuffle(-(-x.numel() // stride), x.device)


def residuals_of(x: Tensor, step: Tensor, low: Tensor, high: Tensor, axis: int = 0) -> Residuals:
    """Return a table of the rounding residuals `(Q(x) - x) / step` of a subsample, shuffled.

    All elements are used if there are at most 262,144; otherwise, at most 131,072 evenly spaced
    ones are used. Elements outside the boundaries are excluded. If no element is inside, the table
    contains only zeros.

    Args:
        x: a `dense` tensor.
        step: grid step, with one element or one per channel.
        low: lower boundary, same shape as `step`.
        high: upper boundary, same shape as `step`.
        axis: channel dimension.

    Returns:
        The residual table, in units of the step.
    """
    with torch.no_grad():
        stride, order = sample_of(x)
        flat = x.detach().as_strided((x.numel(),), (1,))[::stride]
        scale, least, most = (t.reshape(-1) for t in (step, low, high))
        if step.numel() > 1:
            place = torch.arange(0, x.numel(), stride, device=x.device)
            channel = (place // inner_size(x, step.numel(), axis)) % step.numel()
            scale, least, most = scale[channel], least[channel], most[channel]
        inside = (flat > least) & (flat < most)
        scaled = flat / scale
        residual, inside = (torch.round(scaled) - scaled)[order], inside[order]
        # Move the residuals of elements inside to the front without synchronizing the device.
        slot = torch.where(inside, inside.cumsum(0) - 1, len(flat))
        table = torch.zeros(len(flat) + GROUP, dtype=x.dtype, device=x.device)
        table.scatter_(0, slot, residual)
        used = inside.sum()
        again = torch.arange(GROUP - 1, device=x.device)
        table.scatter_(0, used + again, table[again % used.clamp(min=1)])
        return Residuals(torch.where(used > 0, table, 0.0), used)


def drawn_from(residuals: Residuals, shape: torch.Size, key: int) -> Tensor:
    """Draw empirical noise: each group of elements receives adjacent entries of the table.

    A hash determines the position of the first of these entries. As in a bootstrap, the noise of
    an element has the distribution of the residuals but is independent of the element's own
    residual. Because the table is shuffled, the noise of adjacent elements is independent too.

    Args:
        residuals: table of rounding residuals.
        shape: shape of the result.
        key: 64 bits from `mix`, optionally with an origin; equal keys give equal noise.

    Returns:
        Noise in units of the step.
    """
    table, used = residuals
    first, within = divmod(origin_of(key), GROUP)
    groups = -(-(within + shape.numel()) // GROUP)
    hashed = _hashed(groups, with_origin(key & _MASK, first), table.device)
    chance = hashed.to(torch.int64) & 0xFFFFFFFF
    place = ((chance * used) >> 32)[:, None] + torch.arange(GROUP, device=table.device)
    return table[place.view(-1)[within : within + shape.numel()]].view(shape)


class NoiseClock:
    """Counts the training forward passes of a model; the count and the seed determine all noise.

    All quantizers of a model share one clock. The count advances once per forward pass of the root
    module in training mode, so repeated calls of a layer and recomputation under activation
    checkpointing reuse the noise of that pass.

    Attributes:
        seed: seed of the noise.
        share: share of the batch that this process computes, as numbers of samples: before the
            share, in the share, and in the whole batch. Zeros if there is a single process.
    """

    def __init__(self, seed: int = 0, step: int = 0) -> None:
        """Start counting at `step`."""
        self.seed = seed
        self.share = (0, 0, 0)
        self._place = np.array([step], dtype=np.int64)
        # A tensor that shares the array's memory, for compiled graphs. All other code uses the
        # array, because dispatch modes would intercept operations on the tensor.
        self.count = torch.from_numpy(self._place)

    def __reduce__(self) -> Any:
        """Copy and pickle only the seed and the step; a copy has its own memory."""
        return NoiseClock, (self.seed, self.step)

    @property
    def step(self) -> int:
        """Number of forward passes in training mode so far; may be set, as after a resume."""
        return int(self._place[0])

    @step.setter
    def step(self, value: int) -> None:
        self._place[0] = value

    def key(self, tensor: int, purpose: int) -> int:
        """Return the 64-bit key of the tensor with index `tensor` at this step.

        `purpose` is 0 for the draw of a bit-width and 1 for noise, so that their keys differ.
        """
        return mix(self.seed, self.step, tensor, purpose)

    def origin(self, x: Tensor) -> int:
        """Return the number of elements that precede `x` in the tensor of the whole batch.

        They belong to the samples before this process's share; samples are contiguous in memory.
        The origin is 0 for a tensor whose size is not a multiple of the number of samples, because
        such a tensor does not depend on them.
        """
        before, samples, _ = self.share
        per_sample, rest = divmod(x.numel(), samples) if before else (0, 0)
        return 0 if rest else before * per_sample

    def batch_ratio(self) -> float:
        """Return the size of the whole batch divided by that of this process's share.

        The ratio is 1 if there is a single process.
        """
        _, samples, total = self.share
        return total / samples if samples else 1.0
