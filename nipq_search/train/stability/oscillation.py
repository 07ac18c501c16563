"""Weights that hop between two grid points while they are tuned.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.11086).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nipq_search.quant import FakeQuantizer, quantizers

MOMENTUM = 0.01
"""Weight of the present step in the running frequency (there: m)."""

OFTEN = 0.005
"""Frequency from which on a weight counts as oscillating."""

_SAMPLE = 4096


def tuned_weights(model: nn.Module) -> Iterator[tuple[Tensor, FakeQuantizer]]:
    """Parameters that have a frozen quantizer of their own, channels first."""
    parameters = dict(model.named_parameters())
    # Elsewhere a weight's layout is its owner's affair.
    plain = {id(getattr(module, "weight_quantizer", None)) for module in model.modules()}
    for name, quantizer in quantizers(model).items():
        weight = parameters.get(name.removeprefix("."))  # of a model that is one layer
        if weight is None or quantizer.role != "weight" or not quantizer.bits.is_frozen:
            continue
        if quantizer.channels == 1 or id(quantizer) in plain:
            yield weight, quantizer


def _sampled(weight: Tensor, quantizer: FakeQuantizer) -> Tensor:
    """The grid integers of an even sample of a weight, 1-D."""
    flat = weight.reshape(-1)
    stride = (flat.numel() // _SAMPLE) | 1
    highest = 2 ** (quantizer.bits.hard() - 1) - 1
    step = quantizer.alpha() / highest
    if len(step) > 1:
        places = torch.arange(0, flat.numel(), stride, device=flat.device)
        step = step[places // (flat.numel() // len(step))]
    return torch.round(flat[::stride] / step).clamp(-highest, highest)


class Oscillation:
    """How often the rounded values of a sample of the weights turn back.

    A step counts for a weight whose integer changes in the direction opposite to its last change.
    All sampled weights are one vector, so that a step costs few operations.
    """

    def __init__(self) -> None:
        """Nothing has been seen."""
        self._weights: list[tuple[Tensor, FakeQuantizer]] = []  # found once: it takes longest
        self.integers: Tensor | None = None
        self.directions = self.frequencies = torch.zeros(0)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Look at the weights after a step of the tuning phase; always of one model."""
        self._weights = self._weights or list(tuned_weights(model))
        if not self._weights:
            return
        now = torch.cat([_sampled(*pair).float() for pair in self._weights])
        if self.integers is None:
            self.directions, self.frequencies = torch.zeros_like(now), torch.zeros_like(now)
        else:
            change = torch.sign(now - self.integers)
            turned = (change * self.directions < 0).to(now.dtype)
            self.frequencies = self.frequencies.lerp(turned, MOMENTUM)
            self.directions = torch.where(change != 0, change, self.directions)
        self.integers = now

    def share(self) -> float | None:
        """The share of oscillating weights; None before anything was seen."""
        if self.integers is None:
            return None
        return float((self.frequencies > OFTEN).float().mean())

    def state_dict(self) -> dict[str, Any]:
        """Everything that has been seen."""
        return {
            "integers": self.integers,
            "directions": self.directions,
            "frequencies": self.frequencies,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue on a device from a saved state."""
        if state["integers"] is not None:
            self.integers = state["integers"].to(device)
            self.directions = state["directions"].to(device)
            self.frequencies = state["frequencies"].to(device)


def dampening(model: nn.Module) -> Tensor:
    """The squared distance of weights inside their range from their grid points (eq. 8 there).

    Its gradient draws weights to where rounding puts them; scales get none of it.
    """
    total = next(model.parameters()).new_zeros(())
    for weight, quantizer in tuned_weights(model):
        grid = quantizer.boundary_for(weight).range(weight.dim())
        step, low, high = (t.detach() for t in grid[:3])
        rounded = (torch.round(weight.detach() / step)).clamp(grid.lowest, grid.highest) * step
        inside = (weight.detach() >= low) & (weight.detach() <= high)
        total = total + torch.where(inside, rounded - weight, 0.0).square().sum()
    return total
