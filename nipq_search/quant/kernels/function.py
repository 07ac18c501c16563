"""The autograd node of a quantizer, whatever computes it; see `Backend`."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from nipq_search.quant.kernels.build import SWITCH
from nipq_search.quant.kernels.kept import SMALL, Kept, lives_on, remember
from nipq_search.quant.numerics.functional import Boundary, Grid
from nipq_search.quant.numerics.noise import Residuals


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
    """What quantizes one tensor, and what came of it on the way.

    Attributes:
        backend: the kernels.
        boundary: what determines the range.
        key: of the noise; None rounds.
        empirical: noise from the tensor's own residuals.
        kind: what is kept for the backward.
        version: of the input.
        range_: packed.
        residuals: what noise was drawn from.
        y: the quantized tensor.
    """

    backend: Backend
    boundary: Boundary
    key: int | None
    empirical: bool
    kind: Kept = Kept.INPUT
    version: int = 0
    range_: Tensor | None = None
    residuals: Residuals | None = None
    y: Callable[[], Tensor | None] = lambda: None

    def compute(self, x: Tensor) -> Tensor:
        """`x` quantized, of its own dtype; grids above 8 bits need the float32 in between."""
        axis, range_ = self.boundary.axis, self.range_
        assert range_ is not None
        y = self.backend.forward(x.float(), axis, range_, self.key, self.residuals)
        return y.to(x.dtype)

    def done_before(self, x: Tensor) -> Tensor | None:
        """What another consumer of `x` made of it, where that is the same."""
        if x.is_cuda:  # to compare ranges would wait for the device
            return None
        other: _Call | None = _noisy.get(x)  # type: ignore[no-untyped-call]
        y = None if other is None else other.y()
        if other is None or y is None or y._version or other.range_ is None:
            return None
        own = (self.key, self.empirical, self.boundary.axis, x._version, self.backend)
        its = (other.key, other.empirical, other.boundary.axis, other.version, other.backend)
        if own != its or not torch.equal(self.range_, other.range_):  # type: ignore[arg-type]
            return None
        self.residuals = other.residuals
        return y.detach()


_noisy: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The last call of activations that live, which several layers may consume."""


class _Quantize(torch.autograd.Function):
    """Either quantizer: with a key the noisy one, without the rounding one.

    For the backward it keeps its input. Only what noise makes of a float32 tensor, which lives on
    as the operand of a product, tells all as well, and is kept in place of an input that need not
    live on; see `kept.py`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, bits: Tensor, call: _Call) -> Tensor:
        backend, boundary = call.backend, call.boundary
        call.range_ = backend.packed_range(boundary)
        y = call.done_before(x) if call.kind is Kept.OUTPUT else None
        if y is None:
            if call.empirical:
                call.residuals = backend.residuals_of(x.float(), boundary.axis, call.range_)
            y = call.compute(x)
        ctx.backend, ctx.grid, ctx.axis, ctx.draw = backend, boundary.grid, boundary.axis, None
        if ctx.needs_input_grad[2]:
            ctx.draw = boundary.draw
        ctx.key, ctx.kind, ctx.stride, ctx.dtype = call.key, call.kind, x.stride(), x.dtype
        kept = x if call.kind is Kept.INPUT else y
        ctx.save_for_backward(kept, call.range_, *(call.residuals or ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kept, range_, *table = ctx.saved_tensors
        residuals = Residuals(*table) if table else None
        kept, grad = (plain(t, ctx.stride) for t in (kept.detach(), grads[0]))
        grad_x, grad_alpha, grad_bits = ctx.backend.backward(
            grad, kept, ctx.kind, ctx.axis, range_, ctx.grid, ctx.key, residuals
        )
        by_bits = grad_bits if ctx.draw is None else ctx.draw.gradient(grad_bits)
        return grad_x.to(ctx.dtype), grad_alpha, by_bits, None


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
    if told_by_output and (is_small or not lives_on(x)):
        call.kind = Kept.OUTPUT
    y: Tensor = _Quantize.apply(x, boundary.alpha, boundary.bits, call)
    if not torch.is_grad_enabled():
        return y
    if call.kind is Kept.OUTPUT and x.grad_fn is not None:
        call.version, call.y = x._version, weakref.ref(y)
        _noisy[x] = call
    elif call.kind is Kept.INPUT and not is_small:
        remember(y, x, call.compute)
    return y
