"""How a model's forward runs: once per batch, in the precision of its training."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn


def arithmetic(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which forwards and losses run.

    Parameters keep float32, and quantizers compute in it, whatever the precision.

    Args:
        precision: `float32` or `bfloat16`, as `TrainConfig` checks it.
        device: where the model is.
    """
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


class SharedForward:
    """Stands in for a model within one step and remembers its last output.

    A task's `loss` and `distill_loss` both call the model on the same inputs. Without this the
    model would run twice, with two draws of noise. Every other attribute is the model's own.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap `model`; make a new one for every step."""
        self._model = model
        self._inputs: tuple[Any, ...] | None = None
        self._keywords: dict[str, Any] = {}
        self._output: Any = None

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's output; run anew only on other inputs (compared by identity)."""
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
        """The model's attribute."""
        return getattr(self._model, name)
