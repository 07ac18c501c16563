"""Weights that hop between two grid points while they are tuned.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.11086).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nipq_search.quant import quantizers
from nipq_search.quant.functional import Range

MOMENTUM = 0.01
"""Weight of the present step in the running frequency (there: m)."""

OFTEN = 0.005
"""Frequency from which on a weight counts as oscillating."""

_SAMPLE = 4096


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, Range]]:
    """Parameters that have a frozen quantizer of their own, and their grids."""
    parameters = dict(model.named_parameters())
    # These have their channels first; elsewhere a weight's layout is its owner's affair.
    plain = {id(getattr(module, "weight_quantizer", None)) for module in model.modules()}
    for name, quantizer in quantizers(model).items():
        weight = parameters.get(name.removeprefix("."))  # of a model that is one layer
        if weight is None or quantizer.role != "weight" or not quantizer.bits.is_frozen:
            continue
        if quantizer.channels == 1 or id(quantizer) in plain:
            yield name, weight, quantizer.boundary_for(weight).range(weight.dim())


class Oscillation:
    """How often the rounded values of a sample of the weights turn back.

    A step counts for a weight whose integer changes in the direction opposite to its last change.
    """

    def __init__(self) -> None:
        """Nothing has been seen."""
        self.integers: dict[str, Tensor] = {}
        self.directions: dict[str, Tensor] = {}
        self.frequencies: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Look at the weights after a step of the tuning phase."""
        for name, weight, grid in _weights(model):
            scaled = torch.round(weight / grid.step).clamp(grid.lowest, grid.highest)
            flat = scaled.reshape(-1)
            now = flat[:: (flat.numel() // _SAMPLE) | 1].clone()
            if name not in self.integers:
                self.directions[name] = torch.zeros_like(now)
                self.frequencies[name] = torch.zeros_like(now)
            else:
                change = torch.sign(now - self.integers[name])
                turned = (change * self.directions[name] < 0).to(now.dtype)
                self.frequencies[name].lerp_(turned, MOMENTUM)
                self.directions[name] = torch.where(change != 0, change, self.directions[name])
            self.integers[name] = now

    def share(self) -> float | None:
        """The share of oscillating weights; None before anything was seen."""
        if not self.frequencies:
            return None
        often = sum(int((f > OFTEN).sum()) for f in self.frequencies.values())
        return often / sum(f.numel() for f in self.frequencies.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything that has been seen."""
        return {
            "integers": dict(self.integers),
            "directions": dict(self.directions),
            "frequencies": dict(self.frequencies),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue on a device from a saved state."""

        def moved(key: str) -> dict[str, Tensor]:
            return {name: value.to(device) for name, value in state[key].items()}

        self.integers, self.directions = moved("integers"), moved("directions")
        self.frequencies = moved("frequencies")


def dampening(model: nn.Module) -> Tensor:
    """The squared distance of weights inside their range from their grid points (eq. 8 there).

    Its gradient draws weights to where rounding puts them; scales get none of it.
    """
    total = next(model.parameters()).new_zeros(())
    for _, weight, grid in _weights(model):
        step, low, high = (t.detach() for t in grid[:3])
        rounded = (torch.round(weight.detach() / step)).clamp(grid.lowest, grid.highest) * step
        inside = (weight.detach() >= low) & (weight.detach() <= high)
        total = total + torch.where(inside, rounded - weight, 0.0).square().sum()
    return total
