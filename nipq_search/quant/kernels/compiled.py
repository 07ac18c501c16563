"""NIPQ's training forward as operations that `torch.compile` takes as they are.

Its noise hangs on numbers that every step changes, and its kernels are no torch operations. Here
the step comes in as a tensor, so that one graph serves them all. For the backward the input is
kept; what the compiler keeps beside it is its own decision.
"""

import torch
from torch import Tensor

from nipq_search.quant import functional as F
from nipq_search.quant import kernels, noise, widths
from nipq_search.quant.functional import Boundary, Grid
from nipq_search.quant.noise import NoiseClock


def _boundary(
    raw: Tensor,
    start: Tensor,
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
    draw, bits = None, raw.new_full((1,), width)
    if theta is not None:
        u = noise.centered_uniform(clock.key(bits_key, 0))
        draw = widths.draw(theta, tuple(allowed), u, marginal)
        bits = widths.drawn_bits(draw)
    return Boundary(F.positive(raw, start), bits, Grid(grid), minimum, axis), draw


@torch.library.custom_op("nipq_search::noisy", mutates_args=())
@torch.no_grad()
def noisy(
    x: Tensor,
    raw: Tensor,
    start: Tensor,
    minimum: Tensor,
    theta: Tensor | None,
    marginal: Tensor,
    decayed: Tensor,
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
        x: any floating-point dtype.
        raw: what is learned of the boundaries.
        start: their starting values.
        minimum: of an affine tensor.
        theta: of the bit-width; None where it is `width`.
        marginal: see `BitWidth`.
        decayed: the step at which `marginal` decayed last.
        step: the clock's.
        seed: the clock's.
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
        raw, start, minimum, theta, marginal, clock, width, allowed, grid, axis, bits_key
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
    raw: Tensor,
    start: Tensor,
    minimum: Tensor,
    theta: Tensor | None,
    marginal: Tensor,
    decayed: Tensor,
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
    """Gradients of `x`, `raw` and `theta`; see `noisy`."""
    clock = NoiseClock(seed, int(step))
    boundary, draw = _boundary(
        raw, start, minimum, theta, marginal, clock, width, allowed, grid, axis, bits_key
    )
    grad_x, by_alpha, by_bits = kernels.gradients(grad, x, boundary, clock.key(key, 1), empirical)
    by_raw = by_alpha * start * torch.sigmoid(raw)
    if draw is None:
        return grad_x, by_raw, torch.zeros_like(by_bits)
    if int(decayed) != clock.step:
        decayed.fill_(clock.step)
        marginal.mul_(widths.MARGINAL_DECAY)
    return grad_x, by_raw, draw.gradient(by_bits)


@noisy_backward.register_fake
def _(grad, x, raw, start, minimum, theta, marginal, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(raw), torch.empty_like(marginal)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, raw, start, minimum, theta, marginal, decayed, step, *ctx.rest = inputs
    ctx.learned = theta is not None
    # Not saved as the others are: each consumer of an activation adds to it, backward.
    ctx.marginal, ctx.decayed = marginal, decayed
    ctx.save_for_backward(x, raw, start, minimum, step, *((theta,) if ctx.learned else ()))


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, raw, start, minimum, step, *theta = ctx.saved_tensors
    learned = (*(theta or (None,)), ctx.marginal, ctx.decayed)
    by_x, by_raw, by_theta = noisy_backward(
        grad, x, raw, start, minimum, *learned, step, *ctx.rest
    )
    return by_x, by_raw, None, None, by_theta if ctx.learned else None, *(None,) * 11


noisy.register_autograd(_backward, setup_context=_setup)
