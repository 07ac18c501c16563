"""Layers of image models that are no plain `nn.Conv2d` or `nn.Linear`, made fit to be quantized.

`prepare` converts exact classes only, for a subclass may compute something else. The classes here
say what it is that timm's compute.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nipq_search.quant.layers import LAYERS, QuantLayer


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding: ceil(size / stride) outputs, more zeros at the end.

    The padding depends on the input's size, which `nn.Conv2d` cannot express. It happens inside
    of the layer, so that the tensor that is quantized and counted is the one before it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        x = self.padded(input)
        return self._conv_forward(x, self.weight, self.bias)  # type: ignore[no-any-return]

    def padded(self, x: Tensor) -> Tensor:
        """`x` with as many zeros as this layer needs around it."""
        pads: list[int] = []
        for axis in (1, 0):
            size, stride = x.shape[2 + axis], self.stride[axis]
            reach = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
            missing = max(0, (-(-size // stride) - 1) * stride + reach - size)
            pads += [missing // 2, missing - missing // 2]
        return F.pad(x, pads)


class QuantSameConv2d(QuantLayer, SameConv2d):
    """`SameConv2d` with quantized weight and input; zero lies on every grid."""

    kind = "conv2d"

    def forward(self, input: Tensor) -> Tensor:
        """Shapes as in `SameConv2d`."""
        x, weight = self.padded(self.quantized_input(input)), self.quantized_weight()
        return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return]


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
