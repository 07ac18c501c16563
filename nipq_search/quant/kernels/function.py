"""Autograd function of the quantizers, common to all backends."""

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
from nipq_search.quant.kernels.kept import SMALL_ELEMENTS, Kept, is_retained, register_recipe
from nipq_search.quant.numerics.functional import Boundary, Grid
from nipq_search.quant.numerics.noise import Residuals


class Backend(Protocol):
    """Kernels for one type of device. Tensors are dense and processed in memory order."""

    def packed_range(self, boundary: Boundary) -> Tensor:
        """Return the range of a boundary as a tensor of shape (5 or more, channels).

        The first five rows are the fields of `functional.Range`.
        """

    def residuals_of(self, x: Tensor, axis: int, range_: Tensor) -> Residuals:
        """Return the rounding residuals of a subsample of `x`; see `noise.residuals_of`.

        Args:
            x: dense float32 tensor.
            axis: channel dimension.
            range_: packed range.

        Returns:
            The residual table, in units of the step.
        """

    def forward(
        self,
        x: Tensor,
        axis: int,
        range_: Tensor,
        key: int | None,
        residuals: Residuals | None,
    ) -> Tensor:
        """Return the quantized tensor.

        Args:
            x: dense float32 tensor.
            axis: channel dimension.
            range_: packed range.
            key: key of the noise; None selects rounding.
            residuals: table from which noise is drawn; None for uniform noise.

        Returns:
            A float32 tensor in the layout of `x`.
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
        """Return the gradients with respect to the input, the boundaries and the bit-width.

        Args:
            grad: gradient with respect to the output.
            kept: input of the forward pass or, if a key is given, possibly its output.
            kind: whether `kept` is the input or the output.
            axis: channel dimension.
            range_: packed range.
            grid: type of the grid.
            key: key of the noise; None selects rounding.
            residuals: table from which noise was drawn; None for uniform noise.

        Returns:
            The three gradients, of the shape of the input, (channels,) and (1,).
        """


def plain(tensor: Tensor, stride: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `tensor` as an ordinary strided tensor with the given strides and dtype.

    Gradients and saved tensors may arrive in other layouts or dtypes, or as lazy tensors.

    Args:
        tensor: a gradient or a saved tensor.
        stride: required strides, in elements.
        dtype: required dtype.

    Returns:
        `tensor` itself if it already has these properties, otherwise a copy.

    Raises:
        RuntimeError: `tensor` is batched, as in the computation of vectorized gradients.
    """
    # Torch has no public names for the checks for batched and for lazy zero tensors.
    if torch._C._functorch.is_legacy_batchedtensor(tensor):
        raise RuntimeError(
            f"the fast kernels do not support vectorized gradients: set {SWITCH}=eager"
        )
    special = tensor.is_neg() or tensor._is_zerotensor() or type(tensor) is not Tensor
    if tensor.stride() == stride and tensor.dtype is dtype and not special:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=dtype, device=tensor.device).copy_(
        tensor
    )


@dataclasses.dataclass(slots=True)
class _Quantization:
    """Arguments of one quantization, and its intermediate results.

    Attributes:
        backend: the kernels.
        boundary: parameters of the quantization range.
        key: key of the noise; None selects rounding.
        empirical: whether noise is drawn from the tensor's own residuals.
        kind: whether the input or the output is saved for the backward pass.
        version: version counter of the input.
        range_: packed range.
        residuals: table from which noise is drawn; None if it is not empirical.
        y: weak reference to the quantized tensor.
    """

    backend: Backend
    boundary: Boundary
    key: int | None
    empirical: bool
    kind: Kept
    version: int = 0
    range_: Tensor | None = None
    residuals: Residuals | None = None
    y: Callable[[], Tensor | None] = lambda: None

    def compute(self, x: Tensor) -> Tensor:
        """Return the quantized `x` in its own dtype.

        The computation is in float32, because half precision cannot represent grids above 8 bits.
        """
        axis, range_ = self.boundary.axis, self.range_
        assert range_ is not None
        y = self.backend.forward(x.float(), axis, range_, self.key, self.residuals)
        return y.to(x.dtype)

    def reused_output(self, x: Tensor) -> Tensor | None:
        """Return the output of an earlier, identical quantization of `x`, and adopt its residuals.

        Returns:
            The output, or None if there is no such quantization or `x` is on a GPU.
        """
        if x.is_cuda:  # comparing the ranges would synchronize the device
            return None
        other: _Quantization | None = _latest.get(x)  # type: ignore[no-untyped-call]
        y = None if other is None else other.y()
        if other is None or y is None or y._version or other.range_ is None:
            return None
        own = (self.key, self.empirical, self.boundary.axis, x._version, self.backend)
        its = (other.key, other.empirical, other.boundary.axis, other.version, other.backend)
        if own != its or not torch.equal(self.range_, other.range_):  # type: ignore[arg-type]
            return None
        self.residuals = other.residuals
        return y.detach()


_latest: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Latest quantization of each activation still in memory, which several layers may consume."""


class _Quantize(torch.autograd.Function):
    """Autograd node that quantizes with noise if a key is given, otherwise with rounding.

    The backward pass needs the input or, for a noisy float32 tensor, the output. The output is
    retained in any case as the operand of a product, so it is saved instead of the input wherever
    the input can then be freed; see `kept.py`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, bits: Tensor, call: _Quantization) -> Tensor:
        """Return the quantized tensor, and complete `call` with the intermediate results."""
        backend, boundary = call.backend, call.boundary
        call.range_ = backend.packed_range(boundary)
        y = call.reused_output(x) if call.kind is Kept.OUTPUT else None
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
        """Return the gradients with respect to the input, the boundaries and the bit-width."""
        kept, range_, *table = ctx.saved_tensors
        residuals = Residuals(*table) if table else None
        kept, grad = (plain(t, ctx.stride) for t in (kept.detach(), grads[0]))
        grad_x, grad_alpha, grad_bits = ctx.backend.backward(
            grad, kept, ctx.kind, ctx.axis, range_, ctx.grid, ctx.key, residuals
        )
        grad_bits = grad_bits if ctx.draw is None else ctx.draw.gradient(grad_bits)
        return grad_x.to(ctx.dtype), grad_alpha, grad_bits, None


def quantize(
    backend: Backend,
    x: Tensor,
    boundary: Boundary,
    key: int | None = None,
    empirical: bool = False,
) -> Tensor:
    """Compute `functional.pseudo_quantize` or `functional.hard_quantize` with a backend.

    Args:
        backend: kernels for the device of `x`.
        x: dense tensor of float32, bfloat16 or float16.
        boundary: parameters of the quantization range.
        key: key of the noise; None selects rounding.
        empirical: whether noise is drawn from the tensor's own residuals.

    Returns:
        The quantized tensor, of the shape and dtype of `x`.

    Raises:
        RuntimeError: the number of boundaries differs from the size of the channel dimension.
    """
    channels = boundary.alpha.numel()
    if channels > 1 and channels != x.shape[boundary.axis]:
        raise RuntimeError(
            f"{channels} boundaries do not fit dimension {boundary.axis} of {tuple(x.shape)}"
        )
    output_suffices = key is not None and x.dtype is torch.float32
    is_small = x.numel() < SMALL_ELEMENTS
    kind = Kept.OUTPUT if output_suffices and (is_small or not is_retained(x)) else Kept.INPUT
    call = _Quantization(backend, boundary, key, empirical, kind)
    y: Tensor = _Quantize.apply(x, boundary.alpha, boundary.bits, call)
    if not torch.is_grad_enabled():
        return y
    if call.kind is Kept.OUTPUT and x.grad_fn is not None:
        call.version, call.y = x._version, weakref.ref(y)
        _latest[x] = call
    elif call.kind is Kept.INPUT and not is_small:
        register_recipe(y, x, call.compute)
    return y
