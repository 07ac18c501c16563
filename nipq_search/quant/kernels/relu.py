"""ReLU that saves one byte per element for the backward pass instead of its output.

A subsequent quantizer creates a new tensor, which the next layer saves, so the output of the ReLU
can be freed. The kernel supports float32 tensors on a CPU.
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
    """Autograd node that computes `min(max(x, 0), cap)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: float, inplace: bool) -> Tensor:
        """Return `min(max(x, 0), cap)`, and save one byte per element for the backward pass."""
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
        """Return the gradient where the input was between 0 and the cap, and zero elsewhere."""
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
    """Return `min(max(x, 0), cap)`, or None if the kernel does not support or need the call.

    It supports dense float32 tensors on a CPU, and is needed if `x` requires a gradient. In-place
    calls must not overwrite a leaf or a view.

    Args:
        x: tensor of any shape.
        cap: upper limit, possibly infinite.
        inplace: whether to overwrite `x`.

    Returns:
        The result, or None if torch's operation must be used.
    """
    if not (x.requires_grad and torch.is_grad_enabled() and available(x)):
        return None
    if x.dtype is not torch.float32:
        return None
    # Autograd does not permit custom functions to overwrite a leaf or a view.
    if inplace and (x.is_leaf or x._is_view()) or dense(x) is not x:
        return None
    return _ReLU.apply(x, cap, inplace)  # type: ignore[no-any-return]


class _Lean(nn.Module):
    """Base class of the memory-saving ReLU layers of a prepared model."""

    cap: float
    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        """Apply the memory-saving kernel if possible (see `lean_relu`), otherwise torch's ReLU."""
        found = lean_relu(input, self.cap, self.inplace)
        return super().forward(input) if found is None else found


class LeanReLU(_Lean, nn.ReLU):
    """Memory-saving replacement for `nn.ReLU` in a prepared model."""

    cap = float("inf")


class LeanReLU6(_Lean, nn.ReLU6):
    """Memory-saving replacement for `nn.ReLU6` in a prepared model."""

    cap = 6.0


LEAN: dict[type[nn.Module], type[nn.Module]] = {nn.ReLU: LeanReLU, nn.ReLU6: LeanReLU6}
"""Memory-saving class by exact torch class."""


def make_lean(model: nn.Module) -> None:
    """Convert every ReLU and ReLU6 to its memory-saving class, in place, except for subclasses."""
    for module in model.modules():
        if type(module) in LEAN:
            module.__class__ = LEAN[type(module)]
