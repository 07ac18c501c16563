"""Forward passes in training: one per batch, at the configured precision."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn


def arithmetic(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager that sets the precision of forward passes and losses.

    Parameters and quantizers stay in float32 at either precision.

    Args:
        precision: `float32` or `bfloat16`; see `TrainConfig.precision`.
        device: device of the model.

    Returns:
        Autocast for `bfloat16`; for `float32`, a context manager that changes nothing.
    """
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


class SharedForward:
    """A wrapper that caches the model's last output, for the losses of a single batch.

    A task's `loss` and `distill_loss` both call the model on the same inputs. Without the cache,
    the model would run twice, with different noise. All other attributes are forwarded to the
    model.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap `model`; create a new wrapper for every batch."""
        self._model = model
        self._inputs: tuple[Any, ...] | None = None
        self._keywords: dict[str, Any] = {}
        self._output: Any = None

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Return the model's output, from the cache if the inputs are the same objects."""
        same = (
            self._inputs is not None
            and len(inputs) == len(self._inputs)
            and all(a is b for a, b in zip(inputs, self._inputs, strict=True))
            and keywords.keys() == self._keywords.keys()
            and all(value is self._keywords[key] for key, value in keywords.items())
        )
        if not same:
            self._inputs, self._keywords = inputs, keywords
            self._output = self._model(*inputs, **keywords)
        return self._output

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model."""
        return getattr(self._model, name)
