"""Quantized layers. Conversion replaces a module's class; names, hooks and references remain.

The most common layers have a quantized class here, which torch.compile can trace. All other
multiplications, including those of subclasses of these layers, are handled by `sites.py`.
"""

from __future__ import annotations

import abc

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from nipq_search.quant.kernels.kept import flattened, recompute_operands
from nipq_search.quant.quantizers.base import FakeQuantizer
from nipq_search.quant.tracing.sites import inside_owner


class QuantLayer(nn.Module, abc.ABC):
    """Base class of layers that quantize their weight and their input.

    Attributes:
        kind: kind of the function that the layer runs; see `ops.OPS`.
        weight: float weight of the layer.
        weight_quantizer: quantizer of the weight.
        input_quantizer: quantizer of the input, or None for raw uint8 input.
    """

    kind = ""
    weight: Tensor
    weight_quantizer: FakeQuantizer
    input_quantizer: FakeQuantizer | None

    def forward(self, input: Tensor) -> Tensor:
        """Run the layer on the quantized input and weight; shapes as in the float layer."""
        if not torch.compiler.is_compiling() and inside_owner():
            # Hide the multiplication from the enclosing owner. Torch has no public context manager
            # that disables function modes.
            with torch._C.DisableTorchFunction():
                return self._quantized(input)
        return self._quantized(input)

    def _quantized(self, x: Tensor) -> Tensor:
        """Quantize both operands and multiply them."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight = self.weight_quantizer(self.weight)
        if torch.compiler.is_compiling():
            return self.product(x, weight)
        with recompute_operands(x, weight):
            return self.product(x, weight)

    @abc.abstractmethod
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run the float layer's computation on the given operands."""


class QuantLinear(QuantLayer, nn.Linear):
    """A linear layer with quantized weight and input."""

    kind = "linear"

    def _quantized(self, x: Tensor) -> Tensor:
        return super()._quantized(flattened(x, 1))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`; shapes as in `nn.Linear`."""
        return nnf.linear(x, weight, self.bias)


class QuantConv(QuantLayer):
    """A convolution with quantized weight and input."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution of `x`; shapes as in the float layer."""
        # This private method of torch's convolutions applies the padding mode.
        return self._conv_forward(x, weight, self.bias)  # type: ignore[operator, no-any-return]


class QuantConv1d(QuantConv, nn.Conv1d):
    """A 1-D convolution with quantized weight and input."""

    kind = "conv1d"


class QuantConv2d(QuantConv, nn.Conv2d):
    """A 2-D convolution with quantized weight and input."""

    kind = "conv2d"


class QuantConv3d(QuantConv, nn.Conv3d):
    """A 3-D convolution with quantized weight and input."""

    kind = "conv3d"


LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
}
"""Quantized class by exact float class. Subclasses, which may override `forward`, are excluded."""


def convert(module: nn.Module, weight: FakeQuantizer, activation: FakeQuantizer | None) -> None:
    """Convert a float layer into its quantized class, in place.

    Args:
        module: layer whose class is a key of `LAYERS`.
        weight: quantizer of the weight.
        activation: quantizer of the input, or None for raw input.
    """
    module.__class__ = LAYERS[type(module)]
    module.add_module("weight_quantizer", weight)
    module.add_module("input_quantizer", activation)
