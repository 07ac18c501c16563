"""Sensitivity scores: the increase in the loss when only one unit is quantized."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nipq_search.cost.projection import units_of
from nipq_search.errors import UserError
from nipq_search.quant import quantizers
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.tasks import Task
from nipq_search.tasks.base import num_samples, to_device
from nipq_search.train.forward import arithmetic
from nipq_search.train.loop import seed_for
from nipq_search.train.models import load_float, prepare_for
from nipq_search.train.spec import Hooks, Interrupted, TrainSpec

_RUINED = 1e3
"""Factor by which the score of a width with a non-finite loss exceeds all finite scores."""


def _observe_nothing(x: torch.Tensor) -> None:
    """Do nothing: a quantizer that has an observer returns its input unchanged."""


def monotone(losses: Mapping[int, float]) -> dict[int, float]:
    """Return losses by width, corrected for measurement noise.

    The result is sorted by width; its losses are non-negative and do not increase with the width.
    NaN and infinity are replaced by a loss that is far above every finite one.
    """
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    ruined = _RUINED * (1.0 + max(finite, default=0.0))
    found: dict[int, float] = {}
    largest = 0.0
    for width in sorted(losses, reverse=True):
        loss = losses[width] if math.isfinite(losses[width]) else ruined
        found[width] = largest = max(largest, loss)
    return dict(sorted(found.items()))


@torch.no_grad()
def sensitivities(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], torch.Tensor]
) -> dict[str, dict[int, float]]:
    """Measure how much the loss increases when a single unit is quantized.

    All other units stay in floating point. Each score takes one pass over the batches.

    Args:
        model: a prepared and calibrated model with a quantizer that learns no bit-widths and
            whose boundary depends on the width (`lsq`). It is left in eval mode, with different
            bit-widths.
        batches: an iterable that yields the same batches on every pass.
        loss: function that returns a scalar, given the model and a batch.

    Returns:
        Increase in the loss over the float model's, by unit (see `units_of`) and allowed width,
        corrected by `monotone`.

    Raises:
        UserError: the loss of the float model is not finite.
    """
    found = quantizers(model)
    model.eval()

    def measured() -> float:
        values = [float(loss(model, batch)) for batch in batches]
        return sum(values) / len(values)

    for quantizer in found.values():
        quantizer.observer = _observe_nothing
    try:
        base = measured()
        if not math.isfinite(base):
            raise UserError(
                "train.start: sensitivity needs a float model with a finite loss, but the loss is "
                f"{base:g}"
            )
        scores = {}
        for unit, members in units_of(quant_state(model).graph).items():
            of_unit = {}
            for width in found[unit].bits.allowed:
                for member in members:
                    found[member].start_at(width)
                    found[member].observer = None
                of_unit[width] = measured() - base
            for member in members:
                found[member].observer = _observe_nothing
            scores[unit] = monotone(of_unit)
        return scores
    finally:
        for quantizer in found.values():
            quantizer.observer = None


def score(
    task: Task, spec: TrainSpec, device: torch.device, hooks: Hooks
) -> dict[str, dict[int, float]]:
    """Measure the `sensitivities` of a task's float model on `spec.train.score_batches` batches.

    The truncation boundaries are those with which LSQ starts, which are near-optimal at every
    width.

    Args:
        task: provides the model and the training data.
        spec: file of the float model, quantization, training settings and seed.
        device: device to run on.
        hooks: `on_samples` is called after every batch and `should_stop` before it.

    Returns:
        Scores by unit (see `units_of`) and allowed width.

    Raises:
        Interrupted: `hooks.should_stop` returned true.
        UserError: the model cannot be read or prepared.
    """
    assert spec.quant is not None
    quant = dataclasses.replace(spec.quant, quantizer="lsq")
    spec = dataclasses.replace(spec, quant=quant, budget=None, parent=None)
    model = load_float(task, spec.float_model, spec.seed, device)
    prepared, samples = prepare_for(task, model, spec, device)
    hooks.on_samples(samples)

    def loss(scored: nn.Module, batch: Any) -> torch.Tensor:
        if hooks.should_stop():
            raise Interrupted
        with arithmetic(spec.train.precision, device):
            value = task.loss(scored, batch)
        hooks.on_samples(num_samples(task, batch))
        return value

    return sensitivities(prepared, _Batches(task, spec, device), loss)


class _Batches:
    """The first training batches in a fixed order, loaded again on each pass to save memory."""

    def __init__(self, task: Task, spec: TrainSpec, device: torch.device) -> None:
        self.task, self.spec, self.device = task, spec, device

    def __iter__(self) -> Iterator[Any]:
        train = self.spec.train
        loader = self.task.loader("train", train.batch_size, seed_for(self.spec.seed, 1 << 42))
        for batch in itertools.islice(iter(loader), train.score_batches):
            yield to_device(self.task, batch, self.device)
