"""What a training is asked to do, what it reports, and what comes out."""

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
    """The training was asked to stop and has saved its state."""


class Released(Exception):
    """The training's leader does the rest; see `nipq_search.train.parallel`."""


class Paused(Exception):
    """The training reached its pause and has saved its state.

    Args:
        metrics: validation figures of a copy that was projected onto the budget there.
        samples: training samples that the copy took.
    """

    def __init__(self, metrics: Mapping[str, float], samples: int) -> None:
        """Keep the figures."""
        super().__init__("paused")
        self.metrics, self.samples = metrics, samples


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """What to train.

    Attributes:
        train: rates, phases, distillation.
        seed: of data order, noise and everything else that is random.
        quant: how the model is quantized; None trains the float model.
        budget: absolute targets; None leaves the bit-widths where they are (baselines).
        parent: file of the finished trial that this one starts from; None for the float model.
        float_model: file of the float model's state dict; None starts from scratch. Without
            `quant` such a file is evaluated and stored as it is.
        profile: bit-widths by unit (see `units_of`), which are shifted onto the budget to start
            from; they go before `train.start`.
        pause: share of the steps after which the training pauses; None trains to the end.
        losses: what `train.start: sensitivity` needs: scores by unit and width.
        least_noise_steps: a noise phase of fewer steps is left out.
        home: URI of the training's home in an object store, for model and checkpoints; None keeps
            them in its folder.
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
    """What came out: figures on the validation split, exact costs, bit-widths, samples.

    `history` has the learned bit-widths and the task loss's derivative by them, by tensor, at
    some steps of the noise phase and at its end.
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
    """What a training reports while it runs; every member may be left as it is.

    Attributes:
        on_epoch: a point of the learning curve.
        on_samples: training samples just processed.
        should_stop: asked after every step.
        before_write: called before a checkpoint or the trained model is written; may raise
            `Interrupted`.
    """

    on_epoch: Callable[[CurvePoint], None] = lambda point: None
    on_samples: Callable[[int], None] = lambda count: None
    should_stop: Callable[[], bool] = lambda: False
    before_write: Callable[[], None] = lambda: None
