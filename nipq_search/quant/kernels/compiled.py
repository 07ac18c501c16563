"""NIPQ's training forward as operations that `torch.compile` takes as they are.

Its noise hangs on numbers that every step changes, and its kernels are no torch operations. Here
the step comes in as a tensor, so that one graph serves them all. For the backward the input is
kept; what the compiler keeps beside it is its own decision.
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
    """What determines the range, without a graph, and the draw."""
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
    """`x` with noise at a drawn bit-width: what `NIPQ.train_forward` computes.

    Args:
        x: a dense tensor of any floating-point dtype.
        alpha: truncation boundaries, float32 or float64.
        minimum: of an affine tensor.
        theta: of the bit-width; None where it is `width`.
        marginal: see `BitWidth`.
        step: the clock's.
        seed: the clock's, as a signed integer of 64 bits.
        key: number of the tensor.
        bits_key: number of the bit-width.
        width: the width where none is learned.
        allowed: allowed widths, ascending.
        grid: name of the grid.
        axis: dimension of the channels.
        empirical: noise from the tensor's own residuals.
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
    """Gradients of `x`, `alpha` and `theta`; see `noisy`.

    Args besides those:
        grad: of the output.
        decayed: the step at which `marginal` decayed last.
        learns: whether theta does; else `marginal` stays as it is.
    """
    clock = NoiseClock(seed, int(step))
    boundary, draw = _boundary(
        alpha, minimum, theta, marginal, clock, width, allowed, grid, axis, bits_key
    )
    grad_x, by_alpha, by_bits = kernels.gradients(grad, x, boundary, clock.key(key, 1), empirical)
    by_bits, by_theta = by_bits.to(marginal.dtype), torch.zeros_like(marginal)
    if draw is not None and learns:
        if int(decayed) != clock.step:
            decayed.fill_(clock.step)
            marginal.mul_(widths.MARGINAL_DECAY)
        by_theta = draw.gradient(by_bits).to(marginal.dtype)
    return grad_x, by_alpha.to(alpha.dtype), by_theta


@noisy_backward.register_fake
def _(grad, x, alpha, minimum, theta, marginal, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(alpha), torch.empty_like(marginal)


class _Noisy(torch.autograd.Function):
    """Both operations as one node."""

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
        learned = theta is not None
        ctx.save_for_backward(x, alpha, minimum, step, *((theta,) if learned else ()))
        # Not saved as those are: every backward changes them, of which there may be several.
        ctx.marginal, ctx.decayed, ctx.rest = marginal, decayed, rest
        return noisy(x, alpha, minimum, theta, marginal, step, *rest)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, alpha, minimum, step, *saved = ctx.saved_tensors
        theta = saved[0] if saved else None
        learns = bool(saved) and ctx.needs_input_grad[2]
        by_x, by_alpha, by_theta = noisy_backward(
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
        return by_x, by_alpha, by_theta if learns else None, *(None,) * (4 + len(ctx.rest))


def noisy_node(x: Tensor, alpha: Tensor, theta: Tensor | None, *rest: Any) -> Tensor:
    """`noisy`, differentiable in `x`, `alpha` and `theta`.

    Args:
        x: any floating-point dtype and layout.
        alpha: see `noisy`.
        theta: see `noisy`.
        rest: `minimum`, `marginal`, `decayed` and `step` of `noisy_backward`, then its last eight.
    """
    # `noise.dense` sorts strides, which a compiler does not for sizes that it leaves open.
    if torch.empty_like(x).stride() != x.stride():
        x = x.contiguous()
    return _Noisy.apply(x, alpha, theta, *rest)  # type: ignore[no-any-return]
