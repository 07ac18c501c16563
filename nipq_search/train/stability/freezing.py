"""Weights that oscillate are fixed, one after another, while the rest is tuned.

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
class _Seen:
    """Of one weight, all of its shape: where it was and is, and whether it is fixed."""

    integers: Tensor
    directions: Tensor
    frequencies: Tensor
    averages: Tensor
    fixed: Tensor


def _grid(weight: Tensor, quantizer: FakeQuantizer) -> tuple[Tensor, Tensor]:
    """A weight's grid integers, and its step in a shape that broadcasts with it."""
    grid = quantizer.boundary_for(weight).range(weight.dim())
    return torch.round(weight / grid.step).clamp(grid.lowest, grid.highest), grid.step


class Freezing:
    """Fixes each weight that turns back too often at the grid point where it was most.

    Args:
        often: running frequency of turning back from which on a weight is fixed, in turns a step.
    """

    def __init__(self, often: float) -> None:
        """Nothing has been seen."""
        self.often = often
        self._seen: list[_Seen] = []

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Look at the weights after a step of the tuning phase, and put fixed ones back."""
        for index, (weight, quantizer) in enumerate(tuned_weights(model)):
            now, step = _grid(weight, quantizer)
            if index == len(self._seen):
                zero = torch.zeros_like(now)
                self._seen.append(_Seen(now, zero, zero.clone(), now.clone(), zero.bool()))
                continue
            seen = self._seen[index]
            change = torch.sign(now - seen.integers)
            turned = (change * seen.directions < 0).to(now.dtype)
            seen.frequencies.lerp_(turned, MOMENTUM)
            seen.averages = torch.where(
                seen.fixed, seen.averages, seen.averages.lerp(now, MOMENTUM)
            )
            seen.directions = torch.where(change != 0, change, seen.directions)
            seen.fixed |= seen.frequencies > self.often
            seen.integers = torch.where(seen.fixed, torch.round(seen.averages), now)
            weight.copy_(torch.where(seen.fixed, seen.integers * step, weight))

    def share(self) -> float | None:
        """The share of weights that are fixed; None before anything was seen."""
        if not self._seen:
            return None
        fixed = sum(int(seen.fixed.sum()) for seen in self._seen)
        return fixed / sum(seen.fixed.numel() for seen in self._seen)

    def state_dict(self) -> list[dict[str, Tensor]]:
        """Everything that has been seen, a weight an entry."""
        return [vars(seen) for seen in self._seen]

    def load_state_dict(self, state: list[dict[str, Any]], device: torch.device) -> None:
        """Continue on a device from a saved state."""
        names = [field.name for field in dataclasses.fields(_Seen)]
        self._seen = [_Seen(*(entry[name].to(device) for name in names)) for entry in state]
