"""Convolutions run faster on a CPU when channels lie side by side in memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from nipq_search.quant.trace import as_arguments


def use_channels_last(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Lay 2-D convolutions out channels last, in place, where the model's code allows it.

    On 2 CPU cores a float step takes 0.6 of the time for EfficientNet-Lite0 and MobileNetV2, and
    0.9 for ResNet-18 (docs/performance.md). A model that calls `view` on what a convolution
    returns cannot run so, and stays as it is; so does a model on a GPU.

    Args:
        model: a float model.
        example_inputs: as `Task.example_inputs` gives them, on the model's device.
    """
    convolutions = (nn.Conv2d, nn.ConvTranspose2d)
    if not any(isinstance(module, convolutions) for module in model.modules()):
        return model
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return model
    if _runs(_converted(copy.deepcopy(model)), example_inputs):
        return _converted(model)
    return model


def _converted(model: nn.Module) -> nn.Module:
    return convert_conv2d_weight_memory_format(model, torch.channels_last)


def _runs(model: nn.Module, example_inputs: Any) -> bool:
    """Whether a forward gets by without a view that this layout does not allow."""
    args, kwargs = as_arguments(example_inputs)
    with torch.no_grad(), torch.random.fork_rng():
        for training in (True, False):
            try:
                model.train(training)(*args, **kwargs)
            except Exception as error:  # others are the model's own, and reported where it trains
                if "view size" in str(error) or "contiguous" in str(error):
                    return False
    return True
