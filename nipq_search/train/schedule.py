"""Phases and learning rate of a training run, as pure functions of the optimizer step."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


class Phase(enum.StrEnum):
    """Phases: training of the float model, the noise phase, and tuning at frozen bit-widths."""

    FLOAT = "float"
    NOISE = "noise"
    TUNING = "tuning"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Phases and learning rate of a training run, in optimizer steps.

    Attributes:
        batches_per_epoch: batches per epoch.
        accumulate: batches per step; the last step of an epoch may have fewer.
        steps_per_epoch: steps per epoch.
        total: total number of steps.
        noise: number of steps in the noise phase, which comes first.
        warmup: number of steps over which the learning rate rises linearly from a tenth of its
            peak.
        quantized: whether the model is a prepared one, rather than the float model.
    """

    batches_per_epoch: int
    accumulate: int
    steps_per_epoch: int
    total: int
    noise: int
    warmup: int
    quantized: bool

    def phase(self, step: int) -> Phase:
        """Return the phase of a step, counted from 0."""
        if not self.quantized:
            return Phase.FLOAT
        return Phase.NOISE if step < self.noise else Phase.TUNING

    def rate(self, step: int) -> float:
        """Return a step's learning-rate factor: warm-up from 0.1, then cosine decay to 1e-3."""
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
    """Return the schedule of a training run.

    Args:
        epochs: passes over the training split; may be fractional.
        batches_per_epoch: batches per epoch.
        accumulate: batches per step.
        noise_share: fraction of the steps in the noise phase.
        warmup: fraction of the steps in the warm-up.
        quantized: whether the model is a prepared one, rather than the float model.
        learns_bits: whether the quantizer learns bit-widths; if not, there is no noise phase.

    Returns:
        The schedule, with at least one step.
    """
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
