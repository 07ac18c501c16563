"""The autograd node of a quantizer, whatever computes it; see `Backend`."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nipq_search.quant.functional import Boundary, Grid
from nipq_search.quant.kernels.build import SWITCH
from nipq_search.quant.kernels.kept import SMALL, Kept, lives_on, remember
from nipq_search.quant.noise import Residuals


class Backend(Protocol):
    """Kernels of one kind of device. Tensors are dense, and walked in the order of memory."""

    def packed_range(self, boundary: Boundary) -> Tensor:
        """The members of `functional.Range` as the first rows, shape (5 or more, channels)."""

    def residuals_of(self, x: Tensor, axis: int, range_: Tensor) -> Residuals:
        """As `noise.residuals_of`."""

    def forward(
        self,
        x: Tensor,
        axis: int,
        range_: Tensor,
        key: int | None,
        residuals: Residuals | None,
    ) -> Tensor:
        """The quantized tensor.

        Args:
            x: float32.
            axis: dimension of the channels.
            range_: packed.
            key: of the noise; None rounds.
            residuals: what noise is drawn from; None for uniform noise.
        """

    def backward(
        self,
        grad: Tensor,
        kept: Tensor,
        kind: Kept,
        axis: int,
        range_: Tensor,
        grid: Grid,
        key: int | None,
        residuals: Residuals | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `x`, of `boundary.alpha`, shape (channels,), and of the bits, shape (1,).

        Args:
            grad: of the output.
            kept: the input, or, with a key, the output.
            kind: which of them.
            axis: as in the forward, like the rest.
            range_: as above.
            grid: the boundary's.
            key: as above.
            residuals: as above.
        """


def plain(tensor: Tensor, stride: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """`tensor` as memory in this layout: gradients and saved tensors come in any other as well."""
    if torch._C._functorch.is_legacy_batchedtensor(tensor):
        raise RuntimeError(
            f"vectorized gradients do not go through the fast kernels: set {SWITCH}=eager"
        )
    special = tensor.is_neg() or tensor._is_zerotensor() or type(tensor) is not Tensor
    if tensor.stride() == stride and tensor.dtype is dtype and not special:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=dtype, device=tensor.device).copy_(
        tensor
    )


@dataclasses.dataclass(slots=True)
class _Call:
    """What quantizes one tensor, and what came of it on the way."""

    backend: Backend
    boundary: Boundary
    key: int | None
    empirical: bool
    made: tuple[Tensor, Residuals | None] | None = None

    def forward(self, x: Tensor, range_: Tensor, residuals: Residuals | None) -> Tensor:
        """`x` quantized, of its own dtype; grids above 8 bits need the float32 in between."""
        axis = self.boundary.axis
        return self.backend.forward(x.float(), axis, range_, self.key, residuals).to(x.dtype)


class _Quantize(torch.autograd.Function):
    """Either quantizer: with a key the noisy one, without the rounding one.

    For the backward it keeps its input. Only what noise makes of a float32 tensor, which lives on
    as the operand of a product, tells all as well, and is kept in place of an input that need not
    live on; see `kept.py`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, bits: Tensor, call: _Call, kind: Kept
    ) -> Tensor:
        range_, residuals = call.backend.packed_range(call.boundary), None
        if call.empirical:
            residuals = call.backend.residuals_of(x.float(), call.boundary.axis, range_)
        y = call.forward(x, range_, residuals)
        ctx.call, ctx.kind, ctx.stride, ctx.dtype = call, kind, x.stride(), x.dtype
        call.made = range_, residuals
        ctx.save_for_backward(x if kind is Kept.INPUT else y, range_, *(residuals or ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kept, range_, *table = ctx.saved_tensors
        call: _Call = ctx.call
        residuals = Residuals(*table) if table else None
        axis, grid = call.boundary.axis, call.boundary.grid
        kept, grad = (plain(t, ctx.stride) for t in (kept.detach(), grads[0]))
        grad_x, grad_alpha, grad_bits = call.backend.backward(
            grad, kept, ctx.kind, axis, range_, grid, call.key, residuals
        )
        draw = call.boundary.draw
        by_bits = grad_bits if draw is None else draw.gradient(grad_bits)
        return grad_x.to(ctx.dtype), grad_alpha, by_bits, None, None


def quantize(
    backend: Backend,
    x: Tensor,
    boundary: Boundary,
    key: int | None = None,
    empirical: bool = False,
) -> Tensor:
    """What `functional.pseudo_quantize` and `hard_quantize` compute.

    Args:
        backend: kernels for the device of `x`.
        x: a dense tensor of float32, bfloat16 or float16.
        boundary: what determines its range.
        key: of the noise; None rounds.
        empirical: noise from the tensor's own residuals.
    """
    channels = boundary.alpha.numel()
    if channels > 1 and channels != x.shape[boundary.axis]:
        raise RuntimeError(
            f"{channels} boundaries do not fit dimension {boundary.axis} of {tuple(x.shape)}"
        )
    call = _Call(backend, boundary, key, empirical)
    told_by_output = key is not None and x.dtype is torch.float32
    is_small = x.numel() < SMALL
    kind = Kept.OUTPUT if told_by_output and (is_small or not lives_on(x)) else Kept.INPUT
    y: Tensor = _Quantize.apply(x, boundary.alpha, boundary.bits, call, kind)
    (range_, residuals), call.made = call.made, None  # type: ignore[misc]
    if kind is Kept.INPUT and not is_small and torch.is_grad_enabled():
        held = x.detach()
        remember(y, lambda: call.forward(held, range_, residuals))
    return y
