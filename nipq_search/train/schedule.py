"""Steps, phases and the learning rate of a training, as pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

FLOAT, NOISE, TUNING = "float", "noise", "tuning"
"""Phases: the float model's training; NIPQ's; hard quantization with fixed bits."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When what happens, counted in optimizer steps.

    Attributes:
        batches_per_epoch: batches in an epoch.
        accumulate: batches to a step; the last step of an epoch may have fewer.
        steps_per_epoch: steps in an epoch.
        total: steps in all.
        noise: steps of the noise phase, at the start.
        warmup: steps in which the rate rises linearly from a tenth.
        quantized: whether the model is prepared.
    """

    batches_per_epoch: int
    accumulate: int
    steps_per_epoch: int
    total: int
    noise: int
    warmup: int
    quantized: bool

    def phase(self, step: int) -> str:
        """The phase to which step number `step` (from 0) belongs."""
        if not self.quantized:
            return FLOAT
        return NOISE if step < self.noise else TUNING

    def rate(self, step: int) -> float:
        """Factor on the learning rate at `step`: warm-up from 0.1, cosine down to 1e-3."""
        if step < self.warmup:
            return 0.1 + 0.9 * step / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return 1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def make_schedule(
    *,
    epochs: float,
    batches_per_epoch: int,
    accumulate: int = 1,
    noise_share: float,
    warmup: float,
    quantized: bool,
    learns_bits: bool,
) -> Schedule:
    """The schedule of a training; a quantizer that learns no bits has no noise phase."""
    steps_per_epoch = math.ceil(batches_per_epoch / accumulate)
    total = max(1, round(epochs * steps_per_epoch))
    noise = round(noise_share * total) if quantized and learns_bits else 0
    return Schedule(
        batches_per_epoch=batches_per_epoch,
        accumulate=accumulate,
        steps_per_epoch=steps_per_epoch,
        total=total,
        noise=noise,
        warmup=round(warmup * total),
        quantized=quantized,
    )
