"""Pseudo-quantization noise as a pure function of (seed, step, tensor, element).

Nothing here touches torch's global generator, so a trial that is resumed, or replayed elsewhere,
sees the same noise. The noise of an element is a hash of the key and of the element's place in
memory: the fast kernels compute the same numbers in registers, forward and again backward.
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

_TABLE = 1 << 17
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MASK = (1 << 64) - 1


def not_compiled(function: Function) -> Function:
    """Keep torch.compile out of `function`: noise hangs on a number that every step changes.

    As `torch.compiler.disable`, which would load the compiler (a second) on import already.
    """
    return _disable_dynamo(function)  # type: ignore[return-value]


def mix(*words: int) -> int:
    """Hash integers to 64 well-mixed bits (the finalizer of splitmix64, chained)."""
    state = 0
    for word in words:
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def placed(key: int, origin: int) -> int:
    """The key of a tensor that is a share of a larger one, whose elements before it are `origin`.

    Its elements get the noise that they would get in the whole. Above the 64 bits of a key stands
    the origin.
    """
    return key | origin << 64


def origin_of(key: int) -> int:
    """The number of the first element; see `placed`."""
    return key >> 64


def centered_uniform(*words: int) -> float:
    """One number of the open interval (-1/2, 1/2), a function of the words."""
    return ((mix(*words) >> 12) + 0.5) / (1 << 52) - 0.5


def dense(x: Tensor) -> Tensor:
    """`x` if its elements fill a block of memory, in whatever order; else a copy that does."""
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
    """Whether kernels of ours may serve `x`: float32 or less, outside of traces.

    A tensor of no elements, a subclass (as in export), torch.compile, torch.jit.trace and
    everything that watches or fakes single operations need torch operations.
    """
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
    """How many neighbouring elements of a dense `x` share one of the boundaries along `axis`.

    Element p, in the order of memory, belongs to channel `(p // inner_size) % channels`.
    """
    return int(x.stride(axis)) if channels > 1 else max(1, x.numel())


def signed(word: int, bits: int) -> int:
    """The low bits of a word as a signed integer of so many."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def _hashed(count: int, key: int, device: torch.device) -> Tensor:
    """32 well-mixed bits for each of `count` elements, int32: MurmurHash3's finalizer, keyed.

    Half of the key goes in before the first multiplication and half before the second. 32-bit
    multiplication wraps around as it does in the kernels.
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
    """Noise uniform on (-1/2, 1/2): the odd multiples of 2^-25, which float32 holds exactly.

    Args:
        shape: shape of the result.
        key: 64 bits from `mix`, and perhaps an origin; equal keys give equal noise.
        device: where the noise is needed.
        dtype: float32 or float64.
    """
    bits = _hashed(shape.numel(), key, device) >> 8
    return bits.to(dtype).add_(0.5).mul_(2.0**-24).view(shape)


GROUP = 16
"""Neighbouring elements that draw neighbouring residuals."""


class Residuals(NamedTuple):
    """Rounding residuals of a part of a tensor: a table, and how many of its entries count.

    The first `GROUP - 1` of them are repeated after the last, so that a group needs not wrap.
    """

    table: Tensor
    used: Tensor


def _stride(count: int) -> int:
    """Distance between the elements whose residuals make a tensor's table."""
    stride = 1 if count <= 2 * _TABLE else -(-count // _TABLE)
    # A stride that shares a factor with the shape would visit some channels or columns only.
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


@functools.lru_cache(maxsize=32)
def _shuffle(count: int, device: torch.device) -> Tensor:
    """An order for a table: neighbours of a tensor may be alike, and those of a table are drawn
    together.
    """
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(count)
        return torch.randperm(count, generator=generator).to(device)


def sample_of(x: Tensor) -> tuple[int, Tensor]:
    """Which elements of a dense tensor a table is made from: every so-many-th, in which order."""
    stride = _stride(x.numel())
    return stride, _shuffle(-(-x.numel() // stride), x.device)


def residuals_of(x: Tensor, step: Tensor, low: Tensor, high: Tensor, axis: int = 0) -> Residuals:
    """The residuals `(Q(x) - x) / step` of a subsample: all of at most 262,144 elements, or at
    most 131,072 of more, at an even distance and shuffled.

    Elements outside the boundary are left out. A tensor with nothing inside it gives zeros, which
    nothing reads.

    Args:
        x: a `dense` tensor.
        step: grid step, of one boundary or one per channel.
        low: lower boundary, shaped as `step`.
        high: upper boundary, shaped as `step`.
        axis: dimension of the channels.
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
        # Compact the residuals that are inside to the front, without asking how many there are.
        slot = torch.where(inside, inside.cumsum(0) - 1, len(flat))
        table = torch.zeros(len(flat) + GROUP, dtype=x.dtype, device=x.device)
        table.scatter_(0, slot, residual)
        used = inside.sum()
        again = torch.arange(GROUP - 1, device=x.device)
        table.scatter_(0, used + again, table[again % used.clamp(min=1)])
        return Residuals(torch.where(used > 0, table, 0.0), used)


def drawn_from(residuals: Residuals, shape: torch.Size, key: int) -> Tensor:
    """A bootstrap: each group of elements draws residuals of the table from a hashed place on.

    So an element's noise is independent of its own residual and follows the same law
    ("empirical"). The table is shuffled: what neighbours draw is independent too.
    """
    table, used = residuals
    first, within = divmod(origin_of(key), GROUP)
    groups = -(-(within + shape.numel()) // GROUP)
    chance = _hashed(groups, placed(key & _MASK, first), table.device).to(torch.int64) & 0xFFFFFFFF
    place = ((chance * used) >> 32)[:, None] + torch.arange(GROUP, device=table.device)
    return table[place.view(-1)[within : within + shape.numel()]].view(shape)


class NoiseClock:
    """Counts training forwards of a model; with a seed it determines all of its noise.

    One object is shared by every quantizer of a model. The count moves once per forward of the
    root module in training mode, so repeated calls of a layer and recomputation under activation
    checkpointing see the noise of that forward again.

    Attributes:
        share: where this process sees a share of a batch: samples before it, in it, and in all.
    """

    def __init__(self, seed: int = 0, step: int = 0) -> None:
        """Start at a step."""
        self.seed = seed
        self.share = (0, 0, 0)
        self._place = np.array([step], dtype=np.int64)
        # The same memory: a compiled graph counts with a tensor, and everything else must not, for
        # what fakes or watches operations would do so with these.
        self.count = torch.from_numpy(self._place)

    def __reduce__(self) -> Any:
        """Copies and pickles share no memory."""
        return NoiseClock, (self.seed, self.step)

    @property
    def step(self) -> int:
        """Training forwards so far."""
        return int(self._place[0])

    @step.setter
    def step(self, value: int) -> None:
        self._place[0] = value

    def key(self, tensor: int, purpose: int) -> int:
        """64 bits for the quantizer numbered `tensor` at this step."""
        return mix(self.seed, self.step, tensor, purpose)

    def origin(self, x: Tensor) -> int:
        """Elements of an activation that belong to the samples before this process's share.

        Samples lie one after another in memory. A tensor that does not divide by the samples, as
        one that is no function of them, has no elements before it.
        """
        before, samples, _ = self.share
        per_sample, rest = divmod(x.numel(), samples) if before else (0, 0)
        return 0 if rest else before * per_sample

    def whole(self) -> float:
        """How many times this process's share the whole batch is."""
        _, samples, of = self.share
        return of / samples if samples else 1.0
