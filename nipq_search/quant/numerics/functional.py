"""The mathematics of NIPQ as pure functions of tensors.

Source: Shin et al., "NIPQ: Noise Proxy-based Integrated Pseudo-Quantization", CVPR 2023
(arXiv 2206.00820). Every grid is written as `step * integer`, with the integers from `lowest` to
`highest`; signed, unsigned and affine grids differ in those two numbers alone.
"""

from __future__ import annotations

import enum
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nipq_search.quant.numerics.widths import Draw, drawn_bits

LEAST_BOUNDARY = 1e-12
"""A diverging training may drive a boundary to 0, and x / 0 is no number."""


class Grid(enum.Enum):
    """The shape of a quantization grid."""

    SIGNED = "signed"
    UNSIGNED = "unsigned"
    AFFINE = "affine"

    @property
    def least_bits(self) -> int:
        """The fewest bits that the grid can have: a signed one needs two."""
        return 2 if self is Grid.SIGNED else 1


class Range(NamedTuple):
    """A quantization range, shapes broadcastable to the tensor that it quantizes.

    Attributes:
        step: distance between neighbouring grid points.
        low: lower truncation boundary; values at or below it are truncated.
        high: upper truncation boundary.
        lowest: integer of the lowest grid point, `low / step` rounded.
        highest: integer of the highest grid point.
    """

    step: Tensor
    low: Tensor
    high: Tensor
    lowest: Tensor
    highest: Tensor


class Boundary(NamedTuple):
    """What determines a tensor's range.

    Attributes:
        alpha: truncation boundaries, shape (channels,); see `quantization_range`. With a `start`
            what is learned of them: the boundary is `positive(alpha, start)`.
        bits: bit-width, shape (1,). With a `draw` its theta.
        grid: shape of the grid.
        minimum: of an affine tensor.
        axis: dimension of the channels.
        start: see `alpha`.
        draw: see `bits`.
    """

    alpha: Tensor
    bits: Tensor
    grid: Grid
    minimum: Tensor
    axis: int = 0
    start: Tensor | None = None
    draw: Draw | None = None

    def resolved(self) -> Boundary:
        """The same, without `start` and `draw`; differentiable."""
        alpha = self.alpha if self.start is None else positive(self.alpha, self.start)
        bits = self.bits if self.draw is None else drawn_bits(self.draw)
        return Boundary(alpha, bits, self.grid, self.minimum, self.axis)

    def range(self, dimensions: int) -> Range:
        """The range for a tensor of so many dimensions; differentiable."""
        alpha, bits = self.resolved()[:2]
        if alpha.numel() > 1:
            shape = [1] * dimensions
            shape[self.axis] = -1
            alpha = alpha.view(shape)
        return quantization_range(alpha, bits, self.grid, self.minimum)


def softplus_inverse(value: Tensor) -> Tensor:
    """The `a` with `softplus(a) == value`, for positive values of any size.

    Written as `v + log(-expm1(-v))`, which does not overflow where `log(expm1(v))` does.
    """
    return value + torch.log(-torch.expm1(-value))


def quantization_range(alpha: Tensor, bits: Tensor, grid: Grid, minimum: Tensor) -> Range:
    """Grid and truncation boundaries at `bits` bits; differentiable in `alpha` and `bits`.

    Args:
        alpha: truncation boundary: half the width of a signed range, the width of an unsigned or
            affine one. Positive.
        bits: bit-width, at least 2 for a signed grid and 1 for the others.
        grid: its shape.
        minimum: the least value of an affine tensor, from calibration; unused otherwise.

    Returns:
        The range. An affine zero-point is an integer and constant in the backward, so that zero
        lies on the grid.
    """
    if grid is Grid.SIGNED:
        highest = torch.exp2(bits - 1) - 1
        step = alpha / highest
        return Range(step, -alpha, alpha, -highest.detach(), highest.detach())
    levels = torch.exp2(bits) - 1
    step = alpha / levels
    if grid is Grid.UNSIGNED:
        zero = torch.zeros_like(alpha)
        return Range(step, zero, alpha, torch.zeros_like(levels), levels.detach())
    with torch.no_grad():
        zero_point = torch.clamp(torch.round(-minimum / step), torch.zeros_like(step), levels)
    low = -zero_point * step
    return Range(step, low, alpha + low, -zero_point, levels.detach() - zero_point)


def range_gradients(
    range_: Range, grid: Grid, grad_step: Tensor, grad_low: Tensor, grad_high: Tensor
) -> tuple[Tensor, Tensor]:
    """Derivatives with respect to `alpha` and `bits` of a loss, from those of a range.

    What differentiating `quantization_range` gives, in a few operations. With L levels above the
    lowest, `step = alpha / L` and `dL/db = ln 2 * (L + 1)`; hence
    `dstep/db = -ln 2 * step * (1 + 1 / L)`.

    Args:
        range_: of shape (channels,), as are the gradients.
        grid: its shape.
        grad_step: derivative with respect to the step.
        grad_low: with respect to the lower boundary.
        grad_high: with respect to the upper boundary.

    Returns:
        Derivatives of shape (channels,) and (1,).
    """
    if grid is Grid.SIGNED:
        levels, grad_alpha = range_.highest, grad_high - grad_low
    elif grid is Grid.UNSIGNED:
        levels, grad_alpha = range_.highest, grad_high
    else:  # low = lowest * step and high = alpha + low, with a constant lowest
        levels, grad_alpha = range_.highest - range_.lowest, grad_high
        grad_step = grad_step + range_.lowest * (grad_low + grad_high)
    per_bit = (grad_step * range_.step) * ((1.0 + 1.0 / levels) * -math.log(2.0))
    return grad_alpha + grad_step / levels, per_bit.sum(0, keepdim=True)


def _sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Sum `tensor` down to `shape`, in an order that does not change from run to run."""
    return tensor.sum_to_size(shape)


def range_sums(
    grad: Tensor, x: Tensor, range_: Range, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x`, step, low and high of a noisy quantizer; the last three flat."""
    by_x, *rest = _range_gradients((True,) * 4, grad, x, *range_[:3], noise)
    by_step, by_low, by_high = (t.reshape(-1) for t in rest if t is not None)
    assert by_x is not None
    return by_x, by_step, by_low, by_high


def _range_gradients(
    needed: tuple[bool, ...],
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    low: Tensor,
    high: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a quantizer with respect to x, step, low and high, given its noise."""
    above, below = x >= high, x <= low
    inside = grad.masked_fill(above | below, 0.0)
    grad_step = grad_low = grad_high = None
    if needed[1]:
        if noise is None:  # the hard quantizer's noise is its own rounding residual
            scaled = x / step
            noise = torch.round(scaled).sub_(scaled)
        # Far outside, the noise of rounding is no number.
        grad_step = _sum_to((inside * noise).masked_fill(above | below, 0.0), step.shape)
    if needed[2]:
        grad_low = _sum_to(torch.where(below, grad, 0.0), low.shape)
    if needed[3]:
        grad_high = _sum_to(torch.where(above, grad, 0.0), high.shape)
    return inside, grad_step, grad_low, grad_high


class _PseudoQuantize(torch.autograd.Function):
    """`x + noise * step` inside the range, the boundary outside; exact gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: Tensor, high: Tensor, noise: Tensor
    ) -> Tensor:
        """Return the noisy tensor."""
        ctx.save_for_backward(x, step, low, high, noise)
        y = torch.addcmul(x, noise, step)
        y = torch.where(x >= high, high, y)
        return torch.where(x <= low, low, y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Differentiate the forward, the noise held fixed."""
        return *_range_gradients(ctx.needs_input_grad, grads[0], *ctx.saved_tensors), None


class _HardQuantize(torch.autograd.Function):
    """`clip(round(x / step), lowest, highest) * step`; straight-through gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        low: Tensor,
        high: Tensor,
        lowest: Tensor,
        highest: Tensor,
    ) -> Tensor:
        """Return the grid point nearest to each element."""
        ctx.save_for_backward(x, step, low, high)
        integers = torch.round(x / step)
        return torch.minimum(torch.maximum(integers, lowest), highest).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Pass gradients straight through the rounding (LSQ, arXiv 1902.08153, eq. 3)."""
        found = _range_gradients(ctx.needs_input_grad, grads[0], *ctx.saved_tensors)
        return *found, None, None


def pseudo_quantize(x: Tensor, range_: Range, noise: Tensor) -> Tensor:
    """NIPQ's training forward: noise in place of rounding, no straight-through estimator.

    Args:
        x: tensor of any shape, float32 or float64.
        range_: from `quantization_range`.
        noise: same shape as `x`, in units of the step; carries no gradient.

    Returns:
        `x + noise * step` inside the truncation boundaries and the boundary outside. Gradients
        are those of this expression with the noise held fixed.
    """
    return _PseudoQuantize.apply(x, range_.step, range_.low, range_.high, noise)  # type: ignore[no-any-return]


def hard_quantize(x: Tensor, range_: Range) -> Tensor:
    """Round to the grid: what evaluation, the tuning phase and an exported model compute."""
    return _HardQuantize.apply(  # type: ignore[no-any-return]
        x, range_.step, range_.low, range_.high, range_.lowest, range_.highest
    )


class _Positive(torch.autograd.Function):
    """`start * softplus(raw)`, kept from 0, as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(raw, start)
        return torch.nn.functional.softplus(raw).mul_(start).clamp_(min=LEAST_BOUNDARY)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raw, start = ctx.saved_tensors
        return torch.sigmoid(raw) * start * grads[0], None


def positive(raw: Tensor, start: Tensor) -> Tensor:
    """`start * softplus(raw)`, `LEAST_BOUNDARY` or more; differentiable in `raw`."""
    if torch.compiler.is_compiling():  # which makes one node of several by itself
        return (torch.nn.functional.softplus(raw) * start).clamp(min=LEAST_BOUNDARY)
    return _Positive.apply(raw, start)  # type: ignore[no-any-return]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` in the forward, its gradient times `factor` in the backward."""
    return _ScaleGradient.apply(x, factor)  # type: ignore[no-any-return]
