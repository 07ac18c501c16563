"""Convolutions run faster on a CPU when channels lie side by side in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from nipq_search.quant.insertion.prepare import copy_model
from nipq_search.quant.tracing.flow import tensors_in
from nipq_search.quant.tracing.trace import as_arguments


def use_channels_last(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Lay 2-D convolutions out channels last, in place, where the model's code allows it.

    On 2 CPU cores a float step takes 0.6 of the time for EfficientNet-Lite0 and MobileNetV2, and
    0.9 for ResNet-18 (docs/performance.md). A model that calls `view` on what a convolution
    returns cannot run so and stays as it is, as does one whose output would change; so does a
    model on a GPU.

    Args:
        model: a float model.
        example_inputs: as `Task.example_inputs` gives them, on the model's device.
    """
    convolutions = (nn.Conv2d, nn.ConvTranspose2d)
    if not any(isinstance(module, convolutions) for module in model.modules()):
        return model
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return model
    before = _outputs(copy_model(model), example_inputs)
    after = _outputs(_converted(copy_model(model)), example_inputs)
    return _converted(model) if _alike(before, after) else model


def _converted(model: nn.Module) -> nn.Module:
    return convert_conv2d_weight_memory_format(model, torch.channels_last)


def _outputs(model: nn.Module, example_inputs: Any) -> list[Any]:
    """What a forward gives in eval and in training mode; None where the model does not run."""
    args, kwargs = as_arguments(example_inputs)
    outputs: list[Any] = []
    for training in (False, True):
        with torch.no_grad(), torch.random.fork_rng():
            try:
                outputs.append(model.train(training)(*args, **kwargs))
            except Exception:  # the model's own errors are reported where it trains
                outputs.append(None)
    return outputs


def _alike(before: list[Any], after: list[Any]) -> bool:
    """Whether the layout let the model run in both modes, and changed no figure in eval.

    A model that fails as it is may fail in one mode, as training does on a single sample.
    """
    ran, runs = ([output is not None for output in outputs] for outputs in (before, after))
    if not ran[0] or ran != runs:
        return False
    eval_before, eval_after = (list(tensors_in(outputs[0])) for outputs in (before, after))
    return len(eval_before) == len(eval_after) and all(
        b.shape == a.shape and torch.allclose(b, a, 1e-3, 1e-3, equal_nan=True)
        for b, a in zip(eval_before, eval_after, strict=True)
    )
