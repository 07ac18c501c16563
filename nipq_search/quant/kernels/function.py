"""The autograd node of a quantizer, whatever computes it; see `Backend`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nipq_search.quant.functional import Boundary, Range, quantization_range, range_gradients
from nipq_search.quant.kernels.build import SWITCH
from nipq_search.quant.noise import Residuals, residuals_of


class Backend(Protocol):
    """Kernels of one kind of device. Tensors are dense, and walked in the order of memory."""

    def forward(
        self,
        x: Tensor,
        axis: int,
        range_: Range,
        key: int | None,
        residuals: Residuals | None,
        codes: Tensor | None,
    ) -> Tensor:
        """The quantized tensor.

        Args:
            x: float32.
            axis: dimension of the channels.
            range_: of shape (channels,), or (1,).
            key: of the noise; None rounds.
            residuals: what noise is drawn from; None for uniform noise.
            codes: int16, written where rounding must keep its residuals for the backward.
        """

    def backward(
        self,
        grad: Tensor,
        kept: Tensor,
        axis: int,
        range_: Range,
        key: int | None,
        residuals: Residuals | None,
    ) -> tuple[Tensor, Tensor]:
        """Gradient of `x`, and of step, low and high, shape (channels, 3).

        Args:
            grad: of the output.
            kept: with a key the output; else the codes (int16) or the input.
            axis: as in the forward, like the rest.
            range_: as above.
            key: as above.
            residuals: as above.
        """


def plain(tensor: Tensor, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
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


class _Quantize(torch.autograd.Function):
    """Either quantizer: with a key the noisy one, without the rounding one.

    For the backward the noisy one keeps its output, which the next layer keeps anyway, and the
    rounding one 16 bits for each element: so the input need not live on. A leaf, as a weight is,
    lives on in any case and is kept in place of the bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        bits: Tensor,
        backend: Backend,
        boundary: Boundary,
        key: int | None,
        empirical: bool,
        keep: bool,
    ) -> Tensor:
        range_ = quantization_range(alpha, bits, boundary.grid, boundary.minimum)
        residuals = residuals_of(x, *range_[:3], boundary.axis) if empirical else None
        codes = torch.empty_like(x, dtype=torch.int16) if keep and key is None else None
        y = backend.forward(x, boundary.axis, range_, key, residuals, codes)
        ctx.backend, ctx.stride = backend, x.stride()
        ctx.grid, ctx.axis, ctx.key = boundary.grid, boundary.axis, key
        kept = y if key is not None else (x if codes is None else codes)
        ctx.save_for_backward(kept, *range_, *(residuals or ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kept, *saved = ctx.saved_tensors
        range_ = Range(*saved[:5])
        residuals = Residuals(*saved[5:]) if saved[5:] else None
        kept = plain(kept.detach(), ctx.stride, kept.dtype)
        grad = plain(grads[0], ctx.stride, torch.float32)
        grad_x, sums = ctx.backend.backward(grad, kept, ctx.axis, range_, ctx.key, residuals)
        found = range_gradients(range_, ctx.grid, *sums.to(torch.float32).unbind(1))
        return grad_x, *found, *(None,) * 5


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
        x: a dense float32 tensor.
        boundary: what determines its range.
        key: of the noise; None rounds.
        empirical: noise from the tensor's own residuals.
    """
    channels = boundary.alpha.numel()
    if channels > 1 and channels != x.shape[boundary.axis]:
        raise RuntimeError(
            f"{channels} boundaries do not fit dimension {boundary.axis} of {tuple(x.shape)}"
        )
    keep = torch.is_grad_enabled() and x.grad_fn is not None
    return _Quantize.apply(  # type: ignore[no-any-return]
        x, boundary.alpha, boundary.bits, backend, boundary, key, empirical, keep
    )
