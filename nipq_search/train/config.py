"""How a trial and the float model are trained: frozen and checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nipq_search.errors import UserError, nearest

HYPERPARAMETERS = {
    "lr": "lr",
    "lambda": "lambda_",
    "noise_share": "noise_share",
    "distill_weight": "distill_weight",
    "proxy": "proxy",
    "warmup": "warmup",
    "weight_decay": "weight_decay",
    "lr_bits": "lr_bits",
    "lr_boundaries": "lr_boundaries",
    "momentum": "momentum",
    "grad_clip": "grad_clip",
    "ema": "ema",
    "dampening": "dampening",
    "freezing": "freezing",
    "tuning": "tuning",
    "start": "start",
}
"""Names that a search space may use, and the field of `TrainConfig` that each one sets."""


OPTIMIZERS = ("sgd", "adamw")
"""Optimizers that a training can have; `make_optimizer` builds them."""

STARTS = ("budget", "parent", "sensitivity", "config", "uniform")
"""Where bit-widths start; see `TrainConfig.start`."""

TUNINGS = ("hard", "noise")
"""What quantizers compute in the tuning phase; see `TrainConfig.tuning`."""

PRECISIONS = ("float32", "bfloat16")
"""Arithmetic that a training can have; see `arithmetic`."""


def _check_finite(config: TrainConfig | FloatConfig, section: str) -> None:
    """Raise `UserError` for a figure that is infinite or NaN."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{section}.{field.name.rstrip('_')}: {value} is no finite number")


def _check(condition: bool, key: str, fix: str) -> None:
    if not condition:
        raise UserError(f"{key}: {fix}")


def _check_choice(value: str | None, allowed: tuple[str, ...], key: str) -> None:
    _check(value in allowed, key, f"unknown value {value!r}; use {' or '.join(allowed)}")


def _check_common(config: TrainConfig | FloatConfig, section: str) -> None:
    """Check the fields that both trainings have; raise `UserError`."""
    _check_finite(config, section)
    _check(0 < config.epochs <= 1e6, f"{section}.epochs", "must be above 0 and at most a million")
    for name in ("batch_size", "accumulate"):
        _check(getattr(config, name) >= 1, f"{section}.{name}", "must be at least 1")
    _check(config.lr > 0, f"{section}.lr", "must be above 0")
    for name in ("weight_decay", "grad_clip"):
        _check(getattr(config, name) >= 0, f"{section}.{name}", "must not be negative")
    for name in ("momentum", "ema"):
        _check(
            0 <= getattr(config, name) < 1, f"{section}.{name}", "must be at least 0 and below 1"
        )
    _check(0 <= config.warmup <= 1, f"{section}.warmup", "must lie between 0 and 1")
    _check_choice(config.optimizer, OPTIMIZERS, f"{section}.optimizer")
    _check_choice(config.precision, PRECISIONS, f"{section}.precision")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a trial is trained. SGD or AdamW, warm-up and a cosine over both phases.

    Attributes:
        epochs: passes over the training split, both phases together; fractions are fine.
        batch_size: samples in a batch.
        accumulate: batches to a step; its loss is their mean.
        lr: learning rate of the weights.
        lr_bits: rate of the bit-widths as a multiple of `lr`.
        lr_boundaries: rate of the truncation boundaries as a multiple of `lr`.
        optimizer: `sgd`, or `adamw` with betas 0.9 and 0.999 and an epsilon of 1e-8.
        momentum: Nesterov momentum of `sgd`; `adamw` makes nothing of it.
        weight_decay: decay of weights with two or more dimensions.
        lambda_: regularization strength on the smooth-L1 of cost / target (`lambda` in files).
        noise_share: share of the steps that belong to the noise phase.
        warmup: share of the steps in which the rate rises from a tenth.
        distill: whether a teacher helps: the task's own, else the float model.
        distill_weight: share of the loss that distillation gets, 0..1.
        proxy: law of the noise, `uniform` or `empirical`; None takes `quant.proxy`.
        start: where bit-widths start: at the uniform width that costs the `budget`; at the widths
            of the trial's `parent`, shifted onto the budget (like `budget` where there is none);
            at those that keep the budget with the least measured loss (`sensitivity`); at
            `quant.start_bits` (`config`); or at the largest single width that keeps the budget,
            where they stay (`uniform`). Widths that do not learn, or have no noise phase, are
            projected onto the budget from there.
        fit_ranges: whether truncation boundaries start where the squared error of rounding at the
            starting bit-width is least; for NIPQ, since LSQ has a start of its own. Boundaries
            that a parent learned at another width are scaled by what that changes in any case.
        score_batches: batches on which `sensitivity` measures, once in a sweep.
        calibration_batches: batches that give activations their starting boundaries.
        norm_batches: batches from which normalization statistics are estimated at the end.
        dampening: strength of the pull of weights towards their grid points in the tuning phase,
            against oscillation; 0 for none.
        freezing: how often a weight may turn back in the tuning phase, in turns a step, before it
            is fixed at a grid point; 0 fixes none.
        tuning: what quantizers compute in the tuning phase: `hard` rounding with the
            straight-through estimator, or `noise` of one step at the widths that were frozen
            (NIPQ and DiffQ). Evaluation rounds in either case.
        grad_clip: largest norm of the gradient, or 0 for none.
        precision: of forwards and losses, in training and validation: `float32`, or `bfloat16`
            by autocast. Parameters and quantizers keep float32.
        ema: decay of the moving average of the weights that is taken in the tuning phase, and is
            what is validated and stored; 0 for none. Its warm-up: see `Average`.
        checkpoint_minutes: at most so long between two checkpoints; every epoch has one anyway.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    epochs: float = 4
    batch_size: int = 256
    accumulate: int = 1
    lr: float = 0.04
    lr_bits: float = 5.0
    lr_boundaries: float = 1.0
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    lambda_: float = 15.9
    noise_share: float = 0.3
    warmup: float = 0.05
    distill: bool = True
    distill_weight: float = 0.5
    proxy: str | None = None
    start: str = "budget"
    fit_ranges: bool = False
    score_batches: int = 1
    calibration_batches: int = 4
    norm_batches: int = 20
    dampening: float = 0.0
    freezing: float = 0.0
    tuning: str = "hard"
    grad_clip: float = 0.0
    precision: str = "float32"
    ema: float = 0.0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        """Check every field; raise `UserError`."""
        _check_common(self, "train")
        for name in ("lr_bits", "lr_boundaries", "checkpoint_minutes"):
            _check(getattr(self, name) > 0, f"train.{name}", "must be above 0")
        _check(self.lambda_ >= 0, "train.lambda", "must not be negative")
        for name in ("dampening", "freezing"):
            _check(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        _check_choice(self.tuning, TUNINGS, "train.tuning")
        for name in ("noise_share", "distill_weight"):
            _check(0 <= getattr(self, name) <= 1, f"train.{name}", "must lie between 0 and 1")
        if self.proxy is not None:
            _check_choice(self.proxy, ("uniform", "empirical"), "train.proxy")
        _check_choice(self.start, STARTS, "train.start")
        _check(self.score_batches >= 1, "train.score_batches", "must be at least 1")
        _check(self.calibration_batches >= 1, "train.calibration_batches", "must be at least 1")
        _check(self.norm_batches >= 0, "train.norm_batches", "must not be negative")

    def with_hyperparameters(self, params: Mapping[str, Any]) -> TrainConfig:
        """This configuration with a trial's hyperparameters.

        Raises:
            UserError: a name or a value is unknown.
        """
        fields = {}
        for name, value in params.items():
            if name not in HYPERPARAMETERS:
                raise UserError(f"search.space.{name}: unknown{nearest(name, HYPERPARAMETERS)}")
            fields[HYPERPARAMETERS[name]] = value
        return dataclasses.replace(self, **fields)


@dataclass(frozen=True, kw_only=True)
class FloatConfig:
    """Where the float model comes from: trained here, once per sweep, or a file.

    Attributes:
        epochs: passes over the training split.
        batch_size: samples in a batch.
        accumulate: batches to a step; its loss is their mean.
        lr: peak learning rate.
        weight_decay: decay of weights with two or more dimensions.
        optimizer: `sgd`, or `adamw` with betas 0.9 and 0.999 and an epsilon of 1e-8.
        momentum: Nesterov momentum of `sgd`; `adamw` makes nothing of it.
        warmup: share of the steps in which the rate rises from a tenth.
        grad_clip: largest norm of the gradient, or 0 for none.
        precision: of forwards and losses, in training and validation: `float32`, or `bfloat16`
            by autocast. Parameters and quantizers keep float32.
        ema: decay of the moving average of the weights, which is what is validated and stored; 0
            for none. Its warm-up: see `Average`.
        checkpoint: file with a state dict, instead of training.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    epochs: float = 6
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 0.1
    weight_decay: float = 5e-4
    optimizer: str = "sgd"
    momentum: float = 0.9
    warmup: float = 0.05
    grad_clip: float = 0.0
    precision: str = "float32"
    ema: float = 0.0
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        """Check every field; raise `UserError`."""
        _check_common(self, "float")

    def as_training(self) -> TrainConfig:
        """The configuration of the training loop for the float model."""
        return TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            lr=self.lr,
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
            momentum=self.momentum,
            warmup=self.warmup,
            grad_clip=self.grad_clip,
            precision=self.precision,
            ema=self.ema,
            distill=False,
            noise_share=0.0,
        )
