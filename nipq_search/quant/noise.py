"""Pseudo-quantization noise as a pure function of (seed, step, tensor, element).

Nothing here touches torch's global generator, so a trial that is resumed, or replayed elsewhere,
sees the same noise. Uniform noise is read at a hashed offset from a bank of numbers that is
shuffled once per process: on a CPU, drawing fresh numbers costs many times what reading costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

Function = TypeVar("Function", bound=Callable[..., Any])

_BANK = 1 << 21
_TABLE = 1 << 17
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


def centered_uniform(*words: int) -> float:
    """One number of the open interval (-1/2, 1/2), a function of the words."""
    return ((mix(*words) >> 12) + 0.5) / (1 << 52) - 0.5


@functools.lru_cache(maxsize=8)
def _bank(device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not serve a later training
        return _new_bank(device, dtype)


def _new_bank(device: torch.device, dtype: torch.dtype) -> Tensor:
    # A shuffled lattice rather than random numbers: its mean is 0 and its law uniform exactly.
    order = torch.randperm(_BANK, generator=torch.Generator().manual_seed(0x4E495051))
    return ((order.to(torch.float64) + 0.5) / _BANK - 0.5).to(device=device, dtype=dtype)


def uniform_noise(shape: torch.Size, key: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Noise uniform on (-1/2, 1/2).

    Args:
        shape: shape of the result.
        key: 64 bits from `mix`; equal keys give equal noise.
        device: where the noise is needed.
        dtype: float32 or float64.

    Returns:
        Possibly a view of a shared bank: do not write to it.
    """
    bank = _bank(device, dtype)
    count = shape.numel()
    offset = key % _BANK
    if offset + count <= _BANK:
        return bank[offset : offset + count].view(shape)
    parts, part = [], 0
    while count > 0:
        piece = bank[offset : offset + count]
        parts.append(piece)
        count -= len(piece)
        part += 1
        offset = mix(key, part) % _BANK
    return torch.cat(parts).view(shape)


def residual_noise(x: Tensor, step: Tensor, low: Tensor, high: Tensor, key: int) -> Tensor:
    """Noise drawn from the tensor's own rounding residuals ("empirical" proxy).

    A bootstrap: the residuals `(Q(x) - x) / step` of a strided subsample of at most 131,072
    elements are gathered at random positions, so each element's noise is independent of its own
    residual and follows the same law. Elements outside the boundary are left out. A tensor with
    nothing inside it gets zeros, which nothing reads.

    Args:
        x: the tensor, of any shape.
        step: grid step, broadcastable to `x`.
        low: lower boundary, broadcastable.
        high: upper boundary, broadcastable.
        key: 64 bits from `mix`.
    """
    with torch.no_grad():
        stride = max(1, -(-x.numel() // _TABLE))
        # An even stride would visit few channels only; an odd one walks through all of them.
        stride += 1 - stride % 2
        flat = x.reshape(-1)[::stride]
        if step.numel() == 1:
            scale, least, most = step.reshape(1), low.reshape(1), high.reshape(1)
        else:
            scale, least, most = (t.expand_as(x).reshape(-1)[::stride] for t in (step, low, high))
        inside = (flat > least) & (flat < most)
        scaled = flat / scale
        residual = torch.round(scaled) - scaled
        # Compact the residuals that are inside to the front, without asking how many there are.
        place = torch.where(inside, inside.cumsum(0) - 1, len(flat))
        table = torch.zeros(len(flat) + 1, dtype=x.dtype, device=x.device)
        table.scatter_(0, place, residual)
        table[-1] = 0.0
        count = inside.sum()
        chance = uniform_noise(x.shape, key, x.device, torch.float32) + 0.5
        index = (chance * count).long().clamp_(min=0)
        index = torch.minimum(index, (count - 1).clamp(min=0))
        return torch.where(count > 0, table[index], 0.0)


class NoiseClock:
    """Counts training forwards of a model; with a seed it determines all of its noise.

    One object is shared by every quantizer of a model. The count moves once per forward of the
    root module in training mode, so repeated calls of a layer and recomputation under activation
    checkpointing see the noise of that forward again.
    """

    def __init__(self, seed: int = 0) -> None:
        """Start at step 0."""
        self.seed = seed
        self.step = 0

    def key(self, tensor: int, purpose: int) -> int:
        """64 bits for the quantizer numbered `tensor` at this step."""
        return mix(self.seed, self.step, tensor, purpose)
