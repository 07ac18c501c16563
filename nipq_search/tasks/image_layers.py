"""Layers of timm that are no plain `nn.Conv2d` or `nn.Linear`, as layers that `prepare` converts.

It can quantize subclasses as well, call by call, but then takes the padded image for an activation
like any other rather than for the model's raw input, and counts the padding's zeros.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from nipq_search.quant.layers import LAYERS, QuantLayer
from nipq_search.quant.ops import OPS, Op, Operand


def same_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution with TensorFlow's padding: ceil(size / stride) outputs, more zeros at the end.

    Args:
        input: (B, C, H, W).
        weight: (outputs, C / groups, height, width).
        bias: (outputs,) or None.
        stride: of rows and of columns.
        dilation: likewise.
        groups: as in `torch.nn.functional.conv2d`.
    """
    if has_torch_function((input, weight)):
        arguments = (input, weight, bias, stride, dilation, groups)
        output: Tensor = handle_torch_function(same_conv2d, (input, weight), *arguments)
        return output
    pads: list[int] = []
    for axis in (1, 0):
        size, step = input.shape[2 + axis], stride[axis]
        reach = (weight.shape[2 + axis] - 1) * dilation[axis] + 1
        missing = max(0, (-(-size // step) - 1) * step + reach - size)
        pads += [missing // 2, missing - missing // 2]
    padded = F.pad(input, pads)
    return F.conv2d(padded, weight, bias, tuple(stride), 0, tuple(dilation), groups)


class SameConv2d(nn.Conv2d):
    """A convolution whose padding depends on the size of its input; see `same_conv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        return same_conv2d(input, self.weight, self.bias, self.stride, self.dilation, self.groups)


class QuantSameConv2d(QuantLayer, SameConv2d):
    """`SameConv2d` with quantized weight and input."""

    kind = "conv2d"

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Shapes as in `SameConv2d`. Zero lies on every grid, so padding may come after."""
        return same_conv2d(x, weight, self.bias, self.stride, self.dilation, self.groups)


OPS[same_conv2d] = Op("conv2d", Operand(0, "input", None), Operand(1, "weight", 0))
LAYERS[SameConv2d] = QuantSameConv2d


def plain_layers(model: nn.Module) -> nn.Module:
    """Give timm's own layers of `model` classes that `prepare` knows, in place.

    Parameters, their names and outputs stay what they were.
    """
    theirs: Any = importlib.import_module("timm.layers")
    # timm's linear layer casts for TorchScript only.
    plain = {theirs.Conv2dSame: SameConv2d, theirs.Linear: nn.Linear}
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
    return model
