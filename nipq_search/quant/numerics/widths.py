"""The mathematics of learned bit-widths as pure functions."""

from __future__ import annotations

import bisect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sigmoid(theta: float) -> float:
    """`1 / (1 + exp(-theta))` of any number."""
    if theta < 0.0:
        return 1.0 - sigmoid(-theta)
    return 1.0 / (1.0 + math.exp(-theta))


def soft_bits(theta: Tensor, least: float, most: float) -> Tensor:
    """Continuous bit-width `least + (most - least) * sigmoid(theta)`."""
    return least + (most - least) * torch.sigmoid(theta)


def theta_for(bits: float, least: float, most: float) -> float:
    """The `theta` whose soft bit-width is `bits`.

    The sigmoid is clipped to [0.05, 0.95]: nearer to its ends theta has no gradient to speak of.
    """
    share = min(max((bits - least) / (most - least), 0.05), 0.95)
    return math.log(share / (1.0 - share))


def sample_width(bits: float, allowed: tuple[int, ...], u: float) -> int:
    """`sample_bits` of a number: what a CPU, which need not wait for itself, computes faster."""
    above = min(max(bisect.bisect_right(allowed, bits), 1), len(allowed) - 1)
    lower, upper = allowed[above - 1], allowed[above]
    return upper if (bits - lower) / (upper - lower) > 0.5 - u else lower


def sample_bits(bits: Tensor, allowed: Tensor, u: float) -> Tensor:
    """Round a soft bit-width stochastically to one of its two allowed neighbours.

    Unbiased, `E[sample] == bits`, where `u` is uniform on (-1/2, 1/2). On a set without gaps this
    is `round(bits + u)`. The derivative of the rounding is taken as 1.

    Args:
        bits: soft bit-width, shape (1,).
        allowed: allowed widths in ascending order, shape (k,), at least two.
        u: the draw; one per tensor and step.
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
    among: Tensor | None = None,
) -> Draw:
    """An integer bit-width for one step; see `sample_bits`.

    Args:
        theta: what is learned, shape (1,).
        allowed: allowed widths, ascending.
        u: uniform on (-1/2, 1/2).
        marginal: gets the derivative by the bit-width.
        among: `allowed` as a tensor where `theta` is.
    """
    least, span = allowed[0], allowed[-1] - allowed[0]
    if theta.device.type != "cpu" or torch._C._len_torch_dispatch_stack() > 0:
        with torch.no_grad():
            share = torch.sigmoid(theta)
            among = theta.new_tensor(allowed) if among is None else among
            width = sample_bits(least + span * share, among, u)
            return Draw(theta, width, span * share * (1 - share), marginal)
    part = sigmoid(theta.item())
    number = sample_width(least + span * part, allowed, u)
    return Draw(theta, number, span * part * (1 - part), marginal)


def nearest_bits(bits: float, allowed: tuple[int, ...]) -> int:
    """The allowed width nearest to a soft one; the larger of two equally near ones."""
    return min(allowed, key=lambda width: (abs(width - bits), -width))


MARGINAL_DECAY = 0.98
"""Share of a bit-width's `marginal` that a step leaves."""


class Draw(NamedTuple):
    """A bit-width that was drawn for one step.

    Attributes:
        theta: what is learned, shape (1,).
        width: a number on a CPU, which need not wait for itself, else a tensor of shape (1,).
        slope: derivative of the soft bit-width by theta; number or tensor likewise.
        marginal: running mean of the loss's derivative by the bit-width, shape (1,).
    """

    theta: Tensor
    width: float | Tensor
    slope: float | Tensor
    marginal: Tensor

    def gradient(self, by_bits: Tensor) -> Tensor:
        """The derivative by theta; the one by the bit-width is shown to `marginal`."""
        self.marginal.add_(by_bits, alpha=1.0 - MARGINAL_DECAY)
        return by_bits * self.slope


class _Drawn(torch.autograd.Function):
    """The width of a draw; its derivative is the soft width's."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, draw: Draw) -> Tensor:
        ctx.draw = draw
        if isinstance(draw.width, Tensor):
            return draw.width.to(theta.dtype)
        return theta.new_full((1,), draw.width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.draw.gradient(grads[0]), None


def drawn_bits(draw: Draw) -> Tensor:
    """The width of a draw, shape (1,); differentiable in theta."""
    return _Drawn.apply(draw.theta, draw)  # type: ignore[no-any-return]
