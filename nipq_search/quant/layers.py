"""Quantized layers. Conversion swaps a module's class, so names, hooks and references stay.

To support another kind of layer add a class and a line in `LAYERS`.
"""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor, nn

from nipq_search.quant.quantizer import FakeQuantizer


class QuantLayer(nn.Module):
    """What quantized layers share: the two quantizers. `input_quantizer` is None for raw input."""

    kind = ""
    weight: Tensor
    weight_quantizer: FakeQuantizer
    input_quantizer: FakeQuantizer | None

    def quantized_input(self, x: Tensor) -> Tensor:
        """The operand that the layer consumes."""
        if self.input_quantizer is None:
            return x
        quantized: Tensor = self.input_quantizer(x)
        return quantized

    def quantized_weight(self) -> Tensor:
        """The weight that the layer multiplies with."""
        quantized: Tensor = self.weight_quantizer(self.weight)
        return quantized


class QuantLinear(QuantLayer, nn.Linear):
    """A linear layer with quantized weight and input."""

    kind = "linear"

    def forward(self, input: Tensor) -> Tensor:
        """Shapes as in `nn.Linear`."""
        return nnf.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv1d(QuantLayer, nn.Conv1d):
    """A 1-D convolution with quantized weight and input."""

    kind = "conv1d"

    def forward(self, input: Tensor) -> Tensor:
        """Shapes as in `nn.Conv1d`."""
        x, weight = self.quantized_input(input), self.quantized_weight()
        return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return]


class QuantConv2d(QuantLayer, nn.Conv2d):
    """A 2-D convolution with quantized weight and input."""

    kind = "conv2d"

    def forward(self, input: Tensor) -> Tensor:
        """Shapes as in `nn.Conv2d`."""
        x, weight = self.quantized_input(input), self.quantized_weight()
        return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return]


class QuantConv3d(QuantLayer, nn.Conv3d):
    """A 3-D convolution with quantized weight and input."""

    kind = "conv3d"

    def forward(self, input: Tensor) -> Tensor:
        """Shapes as in `nn.Conv3d`."""
        x, weight = self.quantized_input(input), self.quantized_weight()
        return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return]


LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
}
"""Quantized class of each float class. Subclasses are left alone: their forward may differ."""


def convert(module: nn.Module, weight: FakeQuantizer, activation: FakeQuantizer | None) -> None:
    """Turn a float layer into its quantized class, in place."""
    module.__class__ = LAYERS[type(module)]
    module.add_module("weight_quantizer", weight)
    module.add_module("input_quantizer", activation)
