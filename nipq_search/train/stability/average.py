"""An exponential moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """The moving average of a model's parameters and floating-point buffers.

    Update n, counted from 0, uses the decay `min(decay, (1 + n) / (10 + n))`, so the influence of
    the initial weights vanishes quickly. Integer and non-persistent buffers are not averaged;
    their current values in the model are used.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Initialize the average to the model's current weights."""
        self.decay = decay
        self.updates = 0
        stored = model.state_dict().keys()
        self.values = {
            name: value.detach().clone()
            for name, value in _tensors(model)
            if name in stored and value.is_floating_point()
        }

    def _pairs(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the averaged tensors of `model`, looked up anew: modules may replace buffers."""
        return ((name, value) for name, value in _tensors(model) if name in self.values)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the model's current weights."""
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in self._pairs(model):
            self.values[name].lerp_(value, 1 - kept)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Use the averaged weights in the model; restore its own weights on exit."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the averaged weights to the model."""
        for name, value in self._pairs(model):
            value.copy_(self.values[name])

    def _swap(self, model: nn.Module) -> None:
        """Exchange the averaged weights with those of the model."""
        for name, value in self._pairs(model):
            value.data, self.values[name] = self.values[name], value.data

    def state_dict(self) -> dict[str, Any]:
        """Return the state, which does not include the decay."""
        return {"updates": self.updates, "values": dict(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state.

        Raises:
            RuntimeError: the state belongs to a different model.
        """
        if state["values"].keys() != self.values.keys():
            raise RuntimeError("the averaged weights belong to a different model")
        self.updates = state["updates"]
        for name, value in self.values.items():
            value.copy_(state["values"][name])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers with their names, each tensor once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
