"""Learned bit-widths: soft bit-widths, random draws and their gradients as pure functions."""

from __future__ import annotations

import bisect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sigmoid(theta: float) -> float:
    """Return `1 / (1 + exp(-theta))` without overflow."""
    if theta < 0.0:
        return 1.0 - sigmoid(-theta)
    return 1.0 / (1.0 + math.exp(-theta))


def soft_bits(theta: Tensor, min_bits: float, max_bits: float) -> Tensor:
    """Return the continuous bit-width `min_bits + (max_bits - min_bits) * sigmoid(theta)`.

    Args:
        theta: learned parameter, shape (1,).
        min_bits: smallest allowed bit-width in bits.
        max_bits: largest allowed bit-width in bits.

    Returns:
        The bit-width in bits, shape (1,).
    """
    return min_bits + (max_bits - min_bits) * torch.sigmoid(theta)


def theta_for(bits: float, min_bits: float, max_bits: float) -> float:
    """Return the `theta` whose soft bit-width is `bits`.

    The sigmoid is clipped to [0.05, 0.95], because the gradient with respect to theta nearly
    vanishes outside this range.

    Args:
        bits: bit-width in bits.
        min_bits: smallest allowed bit-width in bits.
        max_bits: largest allowed bit-width in bits.

    Returns:
        The value of `theta`.
    """
    share = min(max((bits - min_bits) / (max_bits - min_bits), 0.05), 0.95)
    return math.log(share / (1.0 - share))


def sample_width(bits: float, allowed: tuple[int, ...], u: float) -> int:
    """Compute `sample_bits` with plain numbers, which is faster on a CPU.

    Args:
        bits: soft bit-width in bits.
        allowed: allowed bit-widths in bits, ascending, at least two.
        u: uniform random number from (-1/2, 1/2).

    Returns:
        The sampled bit-width.
    """
    above = min(max(bisect.bisect_right(allowed, bits), 1), len(allowed) - 1)
    lower, upper = allowed[above - 1], allowed[above]
    return upper if (bits - lower) / (upper - lower) > 0.5 - u else lower


def sample_bits(bits: Tensor, allowed: Tensor, u: float) -> Tensor:
    """Round a soft bit-width stochastically to one of the two nearest allowed widths.

    The sample is unbiased, `E[sample] == bits`, for `u` uniform on (-1/2, 1/2). On a set without
    gaps it equals `round(bits + u)`. The derivative of the rounding is taken to be 1.

    Args:
        bits: soft bit-width in bits, shape (1,).
        allowed: allowed bit-widths in ascending order, shape (k,) with k at least 2.
        u: uniform random number from (-1/2, 1/2), one per tensor and step.

    Returns:
        The sampled bit-width, shape (1,).
    """
    with torch.no_grad():
        above = torch.searchsorted(allowed, bits, right=True).clamp(1, len(allowed) - 1)
        lower, upper = allowed[above - 1], allowed[above]
        share = (bits - lower) / (upper - lower)
        sample = torch.where(share > 0.5 - u, upper, lower)
    return sample + (bits - bits.detach())


def draw(
    theta: Tensor,
    allowed: tuple[int, ...],
    u: float,
    marginal: Tensor,
    allowed_tensor: Tensor | None = None,
) -> Draw:
    """Draw an integer bit-width for one step; see `sample_bits`.

    Args:
        theta: learned parameter, shape (1,).
        allowed: allowed bit-widths in bits, ascending, at least two.
        u: uniform random number from (-1/2, 1/2).
        marginal: running mean, shape (1,), updated in the backward pass; see `Draw`.
        allowed_tensor: `allowed` as a tensor on the device of `theta`; created if None.

    Returns:
        The draw. Its width and slope are plain numbers on a CPU, except in dispatch modes, and
        tensors otherwise.
    """
    min_bits, span = allowed[0], allowed[-1] - allowed[0]
    # Dispatch modes, which only a private function detects, must see operations on tensors.
    if theta.device.type != "cpu" or torch._C._len_torch_dispatch_stack() > 0:
        with torch.no_grad():
            share = torch.sigmoid(theta)
            if allowed_tensor is None:
                allowed_tensor = theta.new_tensor(allowed)
            width = sample_bits(min_bits + span * share, allowed_tensor, u)
            return Draw(theta, width, span * share * (1 - share), marginal)
    fraction = sigmoid(theta.item())
    number = sample_width(min_bits + span * fraction, allowed, u)
    return Draw(theta, number, span * fraction * (1 - fraction), marginal)


def nearest_bits(bits: float, allowed: tuple[int, ...]) -> int:
    """Return the allowed bit-width nearest to a soft one; in case of a tie, the larger one."""
    return min(allowed, key=lambda width: (abs(width - bits), -width))


MARGINAL_DECAY = 0.98
"""Factor by which the running mean `marginal` of a bit-width decays per step."""


class Draw(NamedTuple):
    """Bit-width drawn for one step.

    Attributes:
        theta: learned parameter, shape (1,).
        width: drawn bit-width in bits: a plain number or a tensor of shape (1,); see `draw`.
        slope: derivative of the soft bit-width with respect to theta; same type as `width`.
        marginal: running mean of the derivative of the loss with respect to the bit-width, in
            loss per bit, shape (1,).
    """

    theta: Tensor
    width: float | Tensor
    slope: float | Tensor
    marginal: Tensor

    def gradient(self, grad_bits: Tensor) -> Tensor:
        """Update `marginal` and return the gradient with respect to theta, shape (1,).

        Args:
            grad_bits: gradient with respect to the bit-width, shape (1,).
        """
        self.marginal.add_(grad_bits, alpha=1.0 - MARGINAL_DECAY)
        return grad_bits * self.slope


class _Drawn(torch.autograd.Function):
    """Autograd node that returns the width of a draw; its derivative is that of the soft width."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, draw: Draw) -> Tensor:
        """Return the drawn width as a tensor of shape (1,)."""
        ctx.draw = draw
        if isinstance(draw.width, Tensor):
            return draw.width.to(theta.dtype)
        return theta.new_full((1,), draw.width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient with respect to theta, and update the running mean of the draw."""
        return ctx.draw.gradient(grads[0]), None


def drawn_bits(draw: Draw) -> Tensor:
    """Return the width of a draw, shape (1,), differentiable in theta.

    The backward pass updates the running mean of the draw.
    """
    return _Drawn.apply(draw.theta, draw)  # type: ignore[no-any-return]
