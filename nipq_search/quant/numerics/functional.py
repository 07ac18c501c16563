"""Quantization ranges, noisy and hard quantization, and their gradients as pure functions.

Source: Shin et al., "NIPQ: Noise Proxy-based Integrated Pseudo-Quantization", CVPR 2023
(arXiv 2206.00820). Every grid consists of the points `step * integer` for the integers from
`lowest` to `highest`; signed, unsigned and affine grids differ only in these two bounds.
"""

from __future__ import annotations

import enum
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nipq_search.quant.numerics.widths import Draw, drawn_bits

MIN_BOUNDARY = 1e-12
"""Lower limit of truncation boundaries. Diverging training could drive a boundary to 0, where
`x / step` is undefined."""


class Grid(enum.Enum):
    """Type of a quantization grid, which determines the lowest and the highest integer."""

    SIGNED = "signed"
    UNSIGNED = "unsigned"
    AFFINE = "affine"

    @property
    def min_bits(self) -> int:
        """Smallest bit-width of the grid: 2 for a signed one, otherwise 1."""
        return 2 if self is Grid.SIGNED else 1


GRID_CODES = (Grid.SIGNED, Grid.UNSIGNED, Grid.AFFINE)
"""Grids in the order of their integer codes, which checkpoints and the C kernels use."""


class Range(NamedTuple):
    """Quantization range, with shapes broadcastable to the quantized tensor.

    Attributes:
        step: distance between adjacent grid points.
        low: lower truncation boundary; values at or below it are truncated.
        high: upper truncation boundary; values at or above it are truncated.
        lowest: integer of the lowest grid point: `low / step`, rounded.
        highest: integer of the highest grid point.
    """

    step: Tensor
    low: Tensor
    high: Tensor
    lowest: Tensor
    highest: Tensor


class Boundary(NamedTuple):
    """Parameters that determine the quantization range of a tensor.

    Attributes:
        alpha: truncation boundaries, shape (channels,); see `quantization_range`. If `start` is
            set, this is the raw learned parameter instead, and the boundary is
            `positive(alpha, start)`.
        bits: bit-width in bits, shape (1,). If `draw` is set, this is the theta of the draw
            instead.
        grid: type of the grid.
        minimum: lower end of an affine range, shape (1,).
        axis: channel dimension.
        start: initial boundaries, shape (channels,), or None; see `alpha`.
        draw: bit-width drawn for this step, or None; see `bits`.
    """

    alpha: Tensor
    bits: Tensor
    grid: Grid
    minimum: Tensor
    axis: int = 0
    start: Tensor | None = None
    draw: Draw | None = None

    def resolved(self) -> Boundary:
        """Return the equivalent boundary without `start` and `draw`; differentiable."""
        alpha = self.alpha if self.start is None else positive(self.alpha, self.start)
        bits = self.bits if self.draw is None else drawn_bits(self.draw)
        return Boundary(alpha, bits, self.grid, self.minimum, self.axis)

    def range(self, dimensions: int) -> Range:
        """Return the range for a tensor with `dimensions` dimensions; differentiable."""
        alpha, bits = self.resolved()[:2]
        if alpha.numel() > 1:
            shape = [1] * dimensions
            shape[self.axis] = -1
            alpha = alpha.view(shape)
        return quantization_range(alpha, bits, self.grid, self.minimum)


def softplus_inverse(value: Tensor) -> Tensor:
    """Return the `a` for which `softplus(a) == value`, for positive values of any size.

    Computed as `v + log(-expm1(-v))`, because `log(expm1(v))` overflows for large `v`.
    """
    return value + torch.log(-torch.expm1(-value))


def quantization_range(alpha: Tensor, bits: Tensor, grid: Grid, minimum: Tensor) -> Range:
    """Return the quantization range at `bits` bits; differentiable in `alpha` and `bits`.

    Args:
        alpha: truncation boundaries, positive, in a shape that broadcasts to the tensor: half the
            width of a signed range, or the full width of an unsigned or affine one.
        bits: bit-width in bits, shape (1,), at least 2 for a signed grid and 1 for the others.
        grid: type of the grid.
        minimum: lower end of an affine range, shape (1,), from calibration; unused for other
            grids.

    Returns:
        The range. The zero-point of an affine range is an integer, so that zero is a grid point;
        the backward pass treats it as a constant.
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
    """Return the gradients with respect to `alpha` and `bits`, given those for the range.

    This is the analytic backward pass of `quantization_range`. If `alpha` spans L steps at b bits,
    `step = alpha / L` and `dL/db = ln 2 * (L + 1)`; hence
    `dstep/db = -ln 2 * step * (1 + 1 / L)`.

    Args:
        range_: the range, shape (channels,).
        grid: type of the grid.
        grad_step: gradient with respect to the step, shape (channels,).
        grad_low: gradient with respect to the lower boundary, shape (channels,).
        grad_high: gradient with respect to the upper boundary, shape (channels,).

    Returns:
        Gradients with respect to `alpha`, shape (channels,), and `bits`, shape (1,).
    """
    if grid is Grid.SIGNED:
        levels, grad_alpha = range_.highest, grad_high - grad_low
    elif grid is Grid.UNSIGNED:
        levels, grad_alpha = range_.highest, grad_high
    else:  # low = lowest * step and high = alpha + low, where lowest is constant
        levels, grad_alpha = range_.highest - range_.lowest, grad_high
        grad_step = grad_step + range_.lowest * (grad_low + grad_high)
    per_bit = (grad_step * range_.step) * ((1.0 + 1.0 / levels) * -math.log(2.0))
    return grad_alpha + grad_step / levels, per_bit.sum(0, keepdim=True)


def _sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Reduce `tensor` to `shape` by summation in a deterministic order."""
    return tensor.sum_to_size(shape)


def range_sums(
    grad: Tensor, x: Tensor, range_: Range, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of a noisy quantizer with respect to `x` and the range.

    Args:
        grad: gradient with respect to the output, same shape as `x`.
        x: tensor of any shape.
        range_: quantization range.
        noise: same shape as `x`, in units of the step.

    Returns:
        The gradient with respect to `x`, of the shape of `x`, and the gradients with respect to
        step, low and high, each of shape (channels,).
    """
    grad_x, *rest = _quantizer_gradients((True,) * 4, grad, x, *range_[:3], noise)
    grad_step, grad_low, grad_high = (t.reshape(-1) for t in rest if t is not None)
    assert grad_x is not None
    return grad_x, grad_step, grad_low, grad_high


def _quantizer_gradients(
    needed: tuple[bool, ...],
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    low: Tensor,
    high: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of a quantizer with respect to x, step, low and high.

    The first four flags in `needed` are in the same order. The gradient with respect to x is
    always computed; the others are None if they are not needed. Without `noise`, the quantizer is
    the hard one.
    """
    above, below = x >= high, x <= low
    inside = grad.masked_fill(above | below, 0.0)
    grad_step = grad_low = grad_high = None
    if needed[1]:
        if noise is None:  # the hard quantizer uses the rounding residual instead
            scaled = x / step
            noise = torch.round(scaled).sub_(scaled)
        # Far outside the range, the rounding residual can be NaN.
        grad_step = _sum_to((inside * noise).masked_fill(above | below, 0.0), step.shape)
    if needed[2]:
        grad_low = _sum_to(torch.where(below, grad, 0.0), low.shape)
    if needed[3]:
        grad_high = _sum_to(torch.where(above, grad, 0.0), high.shape)
    return inside, grad_step, grad_low, grad_high


class _PseudoQuantize(torch.autograd.Function):
    """Compute `x + noise * step` inside the range and the boundary outside; exact gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: Tensor, high: Tensor, noise: Tensor
    ) -> Tensor:
        """Return the noisy tensor; see `pseudo_quantize` for the arguments."""
        ctx.save_for_backward(x, step, low, high, noise)
        y = torch.addcmul(x, noise, step)
        y = torch.where(x >= high, high, y)
        return torch.where(x <= low, low, y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Differentiate the forward pass with the noise held fixed."""
        return *_quantizer_gradients(ctx.needs_input_grad, grads[0], *ctx.saved_tensors), None


class _HardQuantize(torch.autograd.Function):
    """Compute `clip(round(x / step), lowest, highest) * step`; straight-through gradients."""

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
        found = _quantizer_gradients(ctx.needs_input_grad, grads[0], *ctx.saved_tensors)
        return *found, None, None


def pseudo_quantize(x: Tensor, range_: Range, noise: Tensor) -> Tensor:
    """Add noise instead of rounding, as NIPQ does in training, with exact gradients.

    Args:
        x: tensor of any shape, float32 or float64.
        range_: quantization range, from `quantization_range`.
        noise: same shape as `x`, in units of the step; carries no gradient.

    Returns:
        `x + noise * step` inside the truncation boundaries and the boundary outside. Gradients
        are those of this expression with the noise held fixed.
    """
    return _PseudoQuantize.apply(x, range_.step, range_.low, range_.high, noise)  # type: ignore[no-any-return]


def hard_quantize(x: Tensor, range_: Range) -> Tensor:
    """Round `x` to the grid, as in evaluation and the tuning phase; straight-through gradients."""
    return _HardQuantize.apply(  # type: ignore[no-any-return]
        x, range_.step, range_.low, range_.high, range_.lowest, range_.highest
    )


class _Positive(torch.autograd.Function):
    """Compute `start * softplus(raw)`, clamped away from 0, as one autograd node."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, start: Tensor) -> Tensor:
        """Return `start * softplus(raw)`, at least `MIN_BOUNDARY`."""
        ctx.save_for_backward(raw, start)
        return torch.nn.functional.softplus(raw).mul_(start).clamp_(min=MIN_BOUNDARY)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient with respect to `raw`, ignoring the clamp; `start` receives none."""
        raw, start = ctx.saved_tensors
        return torch.sigmoid(raw) * start * grads[0], None


def positive(raw: Tensor, start: Tensor) -> Tensor:
    """Return `start * softplus(raw)`, at least `MIN_BOUNDARY`; differentiable in `raw`."""
    if torch.compiler.is_compiling():  # the compiler fuses the operations itself
        return (torch.nn.functional.softplus(raw) * start).clamp(min=MIN_BOUNDARY)
    return _Positive.apply(raw, start)  # type: ignore[no-any-return]


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """Return a view of `x`, and store the factor."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the incoming gradient multiplied by the factor."""
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x` unchanged; its gradient is multiplied by `factor` in the backward pass."""
    return _ScaleGradient.apply(x, factor)  # type: ignore[no-any-return]
