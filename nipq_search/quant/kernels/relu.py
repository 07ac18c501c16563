"""ReLU that keeps a byte for each element for its backward, in place of its whole output.

A quantizer after it makes a tensor of its own, which the next layer keeps. So the output of the
ReLU need not live on. Only float32 tensors on a CPU have this kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nipq_search.quant.kernels.build import library
from nipq_search.quant.kernels.cpu import available
from nipq_search.quant.kernels.function import plain
from nipq_search.quant.numerics.noise import dense


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: float, inplace: bool) -> Tensor:
        y = x if inplace else torch.empty_like(x)
        is_open = torch.empty_like(x, dtype=torch.int8)
        library().nipq_relu_forward(  # type: ignore[union-attr]
            x.data_ptr(),
            y.data_ptr(),
            is_open.data_ptr(),
            x.numel(),
            cap,
            torch.get_num_threads(),
        )
        if inplace:
            ctx.mark_dirty(x)
        ctx.stride = x.stride()
        ctx.save_for_backward(is_open)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        is_open = plain(ctx.saved_tensors[0], ctx.stride, torch.int8)
        grad = plain(grads[0], ctx.stride)
        out = torch.empty_like(grad)
        library().nipq_relu_backward(  # type: ignore[union-attr]
            grad.data_ptr(),
            out.data_ptr(),
            is_open.data_ptr(),
            grad.numel(),
            torch.get_num_threads(),
        )
        return out, None, None


def lean_relu(x: Tensor, cap: float, inplace: bool) -> Tensor | None:
    """`min(max(x, 0), cap)`; None where torch's own operation has to serve."""
    if not (x.requires_grad and torch.is_grad_enabled() and available(x)):
        return None
    if x.dtype is not torch.float32:
        return None
    # Autograd lets no function of ours overwrite a leaf or a view.
    if inplace and (x.is_leaf or x._is_view()) or dense(x) is not x:
        return None
    return _ReLU.apply(x, cap, inplace)  # type: ignore[no-any-return]


class _Lean(nn.Module):
    """A ReLU of a prepared model."""

    cap: float
    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        """Shapes as in the float layer."""
        found = lean_relu(input, self.cap, self.inplace)
        return super().forward(input) if found is None else found


class LeanReLU(_Lean, nn.ReLU):
    """`nn.ReLU` in a prepared model."""

    cap = float("inf")


class LeanReLU6(_Lean, nn.ReLU6):
    """`nn.ReLU6` in a prepared model."""

    cap = 6.0


LEAN: dict[type[nn.Module], type[nn.Module]] = {nn.ReLU: LeanReLU, nn.ReLU6: LeanReLU6}


def make_lean(model: nn.Module) -> None:
    """Swap the class of every ReLU in a model, in place. Subclasses are left alone."""
    for module in model.modules():
        if type(module) in LEAN:
            module.__class__ = LEAN[type(module)]
