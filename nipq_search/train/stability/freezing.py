"""Iterative weight freezing: oscillating weights are fixed while the others are trained.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.11086),
algorithm 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nipq_search.quant import FakeQuantizer
from nipq_search.train.stability.oscillation import MOMENTUM, tuned_weights


@dataclass
class _Tracked:
    """State of one weight tensor; all fields have the shape of the weight.

    Attributes:
        integers: current grid integers.
        directions: signs of the last change of each integer.
        frequencies: running frequencies of reversals.
        averages: running means of the integers.
        fixed: whether each element is frozen.
    """

    integers: Tensor
    directions: Tensor
    frequencies: Tensor
    averages: Tensor
    fixed: Tensor


def _grid(weight: Tensor, quantizer: FakeQuantizer) -> tuple[Tensor, Tensor]:
    """Return a weight's grid integers, and its step in a shape that broadcasts with them."""
    grid = quantizer.boundary_for(weight).range(weight.dim())
    return torch.round(weight / grid.step).clamp(grid.lowest, grid.highest), grid.step


class Freezing:
    """Fixes weights at their most frequent grid point once they oscillate too often.

    That grid point is estimated by the rounded running mean of the weight's grid integers.

    Args:
        threshold: running frequency of reversals, per step, above which a weight is fixed.
    """

    def __init__(self, threshold: float) -> None:
        """Start without observations."""
        self.threshold = threshold
        self._tracked: list[_Tracked] = []

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Observe the weights after a tuning step and reset fixed ones to their grid points."""
        for index, (weight, quantizer) in enumerate(tuned_weights(model)):
            integers, step = _grid(weight, quantizer)
            if index == len(self._tracked):
                zero = torch.zeros_like(integers)
                self._tracked.append(
                    _Tracked(integers, zero, zero.clone(), integers.clone(), zero.bool())
                )
                continue
            tracked = self._tracked[index]
            change = torch.sign(integers - tracked.integers)
            reversals = (change * tracked.directions < 0).to(integers.dtype)
            tracked.frequencies.lerp_(reversals, MOMENTUM)
            tracked.averages = torch.where(
                tracked.fixed, tracked.averages, tracked.averages.lerp(integers, MOMENTUM)
            )
            tracked.directions = torch.where(change != 0, change, tracked.directions)
            tracked.fixed |= tracked.frequencies > self.threshold
            tracked.integers = torch.where(tracked.fixed, torch.round(tracked.averages), integers)
            weight.copy_(torch.where(tracked.fixed, tracked.integers * step, weight))

    def share(self) -> float | None:
        """Return the share of fixed weights; None if no weights have been observed."""
        if not self._tracked:
            return None
        fixed = sum(int(tracked.fixed.sum()) for tracked in self._tracked)
        return fixed / sum(tracked.fixed.numel() for tracked in self._tracked)

    def state_dict(self) -> list[dict[str, Tensor]]:
        """Return the state, with one entry per weight tensor."""
        return [vars(tracked) for tracked in self._tracked]

    def load_state_dict(self, state: list[dict[str, Any]], device: torch.device) -> None:
        """Restore a saved state, with its tensors on `device`."""
        names = [field.name for field in dataclasses.fields(_Tracked)]
        self._tracked = [_Tracked(*(entry[name].to(device) for name in names)) for entry in state]
