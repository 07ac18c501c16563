"""The specification of a training run, its hooks and its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nipq_search.cost.projection import Losses
from nipq_search.quant import QuantConfig
from nipq_search.records import CurvePoint
from nipq_search.train.config import TrainConfig


class Interrupted(Exception):
    """The work was stopped on request; a training run can resume from its last checkpoint."""


class Released(Exception):
    """This process has finished its part; the leader completes the run. See `parallel.py`."""


class Paused(Exception):
    """Training reached the requested pause, and its state is saved.

    Args:
        metrics: validation metrics of a copy of the model, projected onto the budget.
        samples: number of training samples used to estimate the copy's normalization statistics.
    """

    def __init__(self, metrics: Mapping[str, float], samples: int) -> None:
        """Store the metrics and the number of samples."""
        super().__init__("paused")
        self.metrics, self.samples = metrics, samples


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Specification of a training run.

    Attributes:
        train: training settings.
        seed: seed of the data order, the noise and all other random draws.
        quant: quantization of the model; None trains the float model.
        budget: absolute targets by cost name; None sets no target, as for baselines.
        parent: model file of a finished trial to start from; None starts from the float model.
        float_model: file with the float model's state dict; None starts from the weights with
            which the task builds the model. Without `quant`, the model in the file is only
            evaluated and stored.
        profile: starting bit-widths by unit (see `units_of`), to all of which the same number is
            added so that the cost equals the budget. It takes precedence over `train.start`, but
            is ignored with `config` and without a budget.
        pause: fraction of the steps after which training pauses; None trains to the end.
        losses: sensitivity scores by unit and width, for `train.start: sensitivity`.
        least_noise_steps: minimum length of a noise phase, in steps; a shorter one is omitted.
        home: URI of an object store for the model and the checkpoints; None keeps them in the
            folder of the training run.
    """

    train: TrainConfig
    seed: int
    quant: QuantConfig | None = None
    budget: Mapping[str, float] | None = None
    float_model: Path | None = None
    parent: Path | None = None
    profile: Mapping[str, float] | None = None
    losses: Losses | None = None
    pause: float | None = None
    least_noise_steps: int = 0
    home: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a training run.

    Attributes:
        metrics: the task's metrics on the validation split.
        cost: exact costs by name; empty for the float model.
        bits: the bit configuration (see `bit_config`); empty for the float model.
        samples: number of training samples processed, including calibration.
        steps: number of optimizer steps taken.
        model_sha256: digest of the model file.
        history: entries recorded regularly during the noise phase and at its end, each with the
            step, the learned bit-widths by tensor, and the derivatives of the task loss with
            respect to them.
    """

    metrics: Mapping[str, float]
    cost: Mapping[str, float]
    bits: Mapping[str, Any]
    samples: int
    steps: int
    model_sha256: str
    history: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Callbacks of a training run; the defaults do nothing and never stop it.

    Attributes:
        on_epoch: called with a point of the learning curve after every epoch.
        on_samples: called with the number of training samples processed since the last call.
        should_stop: called after every step; True stops the training run.
        before_write: called before a checkpoint or the trained model is written, and again after
            a checkpoint is written; may raise `Interrupted`.
    """

    on_epoch: Callable[[CurvePoint], None] = lambda point: None
    on_samples: Callable[[int], None] = lambda count: None
    should_stop: Callable[[], bool] = lambda: False
    before_write: Callable[[], None] = lambda: None
