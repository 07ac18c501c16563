"""Oscillation: weights that alternate between two grid points during tuning.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.11086).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nipq_search.quant import FakeQuantizer, quantizers

MOMENTUM = 0.01
"""Weight of the current step in the running frequency (m in the paper)."""

OSCILLATING = 0.005
"""Frequency of reversals, per step, above which a weight counts as oscillating."""

_SAMPLE = 4096
"""Approximate number of elements that are sampled from each weight tensor."""


def tuned_weights(model: nn.Module) -> Iterator[tuple[Tensor, FakeQuantizer]]:
    """Yield each weight with a frozen quantizer and channels in dimension 0, and its quantizer."""
    parameters = dict(model.named_parameters())
    # Other quantizers may receive a transformed weight, with channels in another dimension.
    plain = {id(getattr(module, "weight_quantizer", None)) for module in model.modules()}
    for name, quantizer in quantizers(model).items():
        # The tensor names of a model that is a single layer start with a period.
        weight = parameters.get(name.removeprefix("."))
        if weight is None or quantizer.role != "weight" or not quantizer.bits.is_frozen:
            continue
        if quantizer.channels == 1 or id(quantizer) in plain:
            yield weight, quantizer


def _sampled(weight: Tensor, quantizer: FakeQuantizer) -> Tensor:
    """Return the grid integers of an evenly spaced sample of a weight, as a 1-D tensor."""
    flat = weight.reshape(-1)
    stride = (flat.numel() // _SAMPLE) | 1
    highest = 2 ** (quantizer.bits.hard() - 1) - 1
    step = quantizer.alpha() / highest
    if len(step) > 1:
        places = torch.arange(0, flat.numel(), stride, device=flat.device)
        step = step[places // (flat.numel() // len(step))]
    return torch.round(flat[::stride] / step).clamp(-highest, highest)


class Oscillation:
    """Tracks how often the grid integers of sampled weights reverse direction.

    A step counts as a reversal if the integer changes in the direction opposite to its last
    change. All sampled weights form one vector, so that an update takes few tensor operations.
    """

    def __init__(self) -> None:
        """Start without observations."""
        self._weights: list[tuple[Tensor, FakeQuantizer]] = []  # cached: the search is slow
        self.integers: Tensor | None = None
        self.directions = self.frequencies = torch.zeros(0)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Observe the weights after a tuning step; every call must pass the same `model`."""
        self._weights = self._weights or list(tuned_weights(model))
        if not self._weights:
            return
        integers = torch.cat([_sampled(*pair).float() for pair in self._weights])
        if self.integers is None:
            self.directions = torch.zeros_like(integers)
            self.frequencies = torch.zeros_like(integers)
        else:
            change = torch.sign(integers - self.integers)
            reversals = (change * self.directions < 0).to(integers.dtype)
            self.frequencies = self.frequencies.lerp(reversals, MOMENTUM)
            self.directions = torch.where(change != 0, change, self.directions)
        self.integers = integers

    def share(self) -> float | None:
        """Return the share of oscillating weights; None if no weights have been observed."""
        if self.integers is None:
            return None
        return float((self.frequencies > OSCILLATING).float().mean())

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        return {
            "integers": self.integers,
            "directions": self.directions,
            "frequencies": self.frequencies,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore a saved state, with its tensors on `device`."""
        if state["integers"] is not None:
            self.integers = state["integers"].to(device)
            self.directions = state["directions"].to(device)
            self.frequencies = state["frequencies"].to(device)


def dampening(model: nn.Module) -> Tensor:
    """Return the summed squared distance of in-range weights from their grid points (eq. 8).

    The gradient pulls weights towards their grid points; step sizes receive no gradient.
    """
    total = next(model.parameters()).new_zeros(())
    for weight, quantizer in tuned_weights(model):
        grid = quantizer.boundary_for(weight).range(weight.dim())
        step, low, high = (t.detach() for t in grid[:3])
        rounded = (torch.round(weight.detach() / step)).clamp(grid.lowest, grid.highest) * step
        inside = (weight.detach() >= low) & (weight.detach() <= high)
        total = total + torch.where(inside, rounded - weight, 0.0).square().sum()
    return total
