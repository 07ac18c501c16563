"""NIPQ's forward pass in training as custom operators that are opaque to `torch.compile`.

The compiler cannot trace this pass, because the noise depends on the step number and the kernels
are not torch operations. The operators receive the step as a tensor, so the same compiled graph
can be used for all steps. They save their input for the backward pass; the compiler decides which
other tensors to save.
"""

from typing import Any

import torch
from torch import Tensor

from nipq_search.quant import kernels
from nipq_search.quant.numerics import noise, widths
from nipq_search.quant.numerics.functional import Boundary, Grid
from nipq_search.quant.numerics.noise import NoiseClock


def _boundary(
    alpha: Tensor,
    minimum: Tensor,
    theta: Tensor | None,
    marginal: Tensor,
    clock: NoiseClock,
    width: int,
    allowed: list[int],
    grid: str,
    axis: int,
    bits_key: int,
) -> tuple[Boundary, widths.Draw | None]:
    """Return the boundary and, if the bit-width is learned, its draw; see `noisy`."""
    draw, bits = None, alpha.new_full((1,), width)
    if theta is not None:
        u = noise.centered_uniform(clock.key(bits_key, 0))
        draw = widths.draw(theta, tuple(allowed), u, marginal)
        bits = widths.drawn_bits(draw).to(alpha.dtype)
    return Boundary(alpha, bits, Grid(grid), minimum, axis), draw


@torch.library.custom_op("nipq_search::noisy", mutates_args=())
@torch.no_grad()
def noisy(
    x: Tensor,
    alpha: Tensor,
    minimum: Tensor,
    theta: Tensor | None,
    marginal: Tensor,
    step: Tensor,
    seed: int,
    key: int,
    bits_key: int,
    width: int,
    allowed: list[int],
    grid: str,
    axis: int,
    empirical: bool,
) -> Tensor:
    """Add noise at a drawn bit-width, as `NIPQ.train_forward` does.

    Args:
        x: dense tensor of any floating-point dtype.
        alpha: truncation boundaries, float32 or float64, shape (channels,).
        minimum: lower end of an affine range, shape (1,).
        theta: parameter of the bit-width, shape (1,); None if the width is not learned.
        marginal: running mean of the derivative of the loss with respect to the bit-width, shape
            (1,); see `BitWidth`.
        step: step of the noise clock, an integer scalar.
        seed: seed of the noise clock, as a signed 64-bit integer.
        key: index of the tensor in the model.
        bits_key: index of the bit-width in the model.
        width: bit-width in bits if it is not learned.
        allowed: allowed bit-widths in bits, ascending.
        grid: value of a member of `Grid`.
        axis: channel dimension.
        empirical: whether noise is drawn from the tensor's own residuals.

    Returns:
        The noisy tensor, of the shape and dtype of `x`.
    """
    clock = NoiseClock(seed, int(step))
    boundary, _ = _boundary(
        alpha, minimum, theta, marginal, clock, width, allowed, grid, axis, bits_key
    )
    return kernels.pseudo_quantize(x, boundary, clock.key(key, 1), empirical)


@noisy.register_fake
def _(x, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("nipq_search::noisy_backward", mutates_args=("marginal", "decayed"))
@torch.no_grad()
def noisy_backward(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    minimum: Tensor,
    theta: Tensor | None,
    marginal: Tensor,
    decayed: Tensor,
    learns: bool,
    step: Tensor,
    seed: int,
    key: int,
    bits_key: int,
    width: int,
    allowed: list[int],
    grid: str,
    axis: int,
    empirical: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to `x`, `alpha` and `theta`, and update `marginal`.

    Args:
        grad: gradient with respect to the output.
        x: see `noisy`.
        alpha: see `noisy`.
        minimum: see `noisy`.
        theta: see `noisy`.
        marginal: see `noisy`; updated in place if `learns`.
        decayed: step at which `marginal` last decayed, shape (1,); updated in place if `learns`.
        learns: whether theta requires a gradient.
        step: see `noisy`.
        seed: see `noisy`.
        key: see `noisy`.
        bits_key: see `noisy`.
        width: see `noisy`.
        allowed: see `noisy`.
        grid: see `noisy`.
        axis: see `noisy`.
        empirical: see `noisy`.

    Returns:
        Gradients with respect to `x`, of its shape, `alpha`, shape (channels,), and `theta`, shape
        (1,). The last is zero unless `learns` is true.
    """
    clock = NoiseClock(seed, int(step))
    boundary, draw = _boundary(
        alpha, minimum, theta, marginal, clock, width, allowed, grid, axis, bits_key
    )
    grad_x, grad_alpha, grad_bits = kernels.gradients(
        grad, x, boundary, clock.key(key, 1), empirical
    )
    grad_bits, grad_theta = grad_bits.to(marginal.dtype), torch.zeros_like(marginal)
    if draw is not None and learns:
        if int(decayed) != clock.step:
            decayed.fill_(clock.step)
            marginal.mul_(widths.MARGINAL_DECAY)
        grad_theta = draw.gradient(grad_bits).to(marginal.dtype)
    return grad_x, grad_alpha.to(alpha.dtype), grad_theta


@noisy_backward.register_fake
def _(grad, x, alpha, minimum, theta, marginal, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(alpha), torch.empty_like(marginal)


class _Noisy(torch.autograd.Function):
    """Autograd node that combines `noisy` and `noisy_backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        theta: Tensor | None,
        minimum: Tensor,
        marginal: Tensor,
        decayed: Tensor,
        step: Tensor,
        *rest: Any,
    ) -> Tensor:
        """Return the noisy tensor; see `noisy_node` for the arguments."""
        learned = theta is not None
        ctx.save_for_backward(x, alpha, minimum, step, *((theta,) if learned else ()))
        # Not passed to `save_for_backward`, because every backward pass modifies them in place.
        ctx.marginal, ctx.decayed, ctx.rest = marginal, decayed, rest
        return noisy(x, alpha, minimum, theta, marginal, step, *rest)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients with respect to `x`, `alpha` and, if it is learned, `theta`."""
        x, alpha, minimum, step, *saved = ctx.saved_tensors
        theta = saved[0] if saved else None
        learns = bool(saved) and ctx.needs_input_grad[2]
        # Also updates `ctx.marginal` and `ctx.decayed` in place.
        grad_x, grad_alpha, grad_theta = noisy_backward(
            grads[0],
            x,
            alpha,
            minimum,
            theta,
            ctx.marginal,
            ctx.decayed,
            learns,
            step,
            *ctx.rest,
        )
        # No gradients for `minimum`, `marginal`, `decayed`, `step` and the arguments in `rest`.
        return grad_x, grad_alpha, grad_theta if learns else None, *(None,) * (4 + len(ctx.rest))


def noisy_node(x: Tensor, alpha: Tensor, theta: Tensor | None, *rest: Any) -> Tensor:
    """Return `noisy(x, ...)`, differentiable in `x`, `alpha` and `theta`.

    Args:
        x: tensor of any floating-point dtype and layout.
        alpha: see `noisy`.
        theta: see `noisy`.
        rest: the arguments `minimum`, `marginal`, `decayed` and `step` of `noisy_backward`,
            followed by its arguments from `seed` to `empirical`.

    Returns:
        The noisy tensor, of the shape and dtype of `x`.
    """
    # `noise.dense` sorts strides, which compilers do not support for symbolic sizes.
    if torch.empty_like(x).stride() != x.stride():
        x = x.contiguous()
    return _Noisy.apply(x, alpha, theta, *rest)  # type: ignore[no-any-return]
