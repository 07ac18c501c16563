"""An exponential moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """The moving average of a model's parameters and float buffers, from now on.

    Update number n (from 0) keeps the share `min(decay, (1 + n) / (10 + n))` of the average: the
    weights of the start are soon forgotten. Integer buffers, and what the model does not store,
    are not averaged: the model's own hold.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start at the model's present weights."""
        self.decay = decay
        self.updates = 0
        stored = model.state_dict().keys()
        self.values = {
            name: value.detach().clone()
            for name, value in _tensors(model)
            if name in stored and value.is_floating_point()
        }

    def _pairs(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors that are averaged. By name: modules may replace their buffers."""
        return ((name, value) for name, value in _tensors(model) if name in self.values)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights in."""
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in self._pairs(model):
            self.values[name].lerp_(value, 1 - kept)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model has the averaged weights; afterwards its own again."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the model the averaged weights for good."""
        for name, value in self._pairs(model):
            value.copy_(self.values[name])

    def _swap(self, model: nn.Module) -> None:
        for name, value in self._pairs(model):
            value.data, self.values[name] = self.values[name], value.data

    def state_dict(self) -> dict[str, Any]:
        """Everything but the decay."""
        return {"updates": self.updates, "values": dict(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state of the same model.

        Raises:
            RuntimeError: the state is of another model.
        """
        if state["values"].keys() != self.values.keys():
            raise RuntimeError("the averaged weights are of another model")
        self.updates = state["updates"]
        for name, value in self.values.items():
            value.copy_(state["values"][name])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
