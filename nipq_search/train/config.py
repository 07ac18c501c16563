"""Training configurations for trials and for the float model, frozen and validated."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nipq_search.errors import UserError, nearest
from nipq_search.quant import Proxy

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
"""Hyperparameters that can be searched, each with the field of `TrainConfig` that it sets."""

OPTIMIZERS = ("sgd", "adamw")
"""Names of the optimizers; see `make_optimizer`."""

PRECISIONS = ("float32", "bfloat16")
"""Names of the arithmetic precisions; see `arithmetic`."""


class BitStart(enum.StrEnum):
    """Source of the initial bit-widths; see `TrainConfig.start`."""

    BUDGET = "budget"
    PARENT = "parent"
    SENSITIVITY = "sensitivity"
    CONFIG = "config"
    UNIFORM = "uniform"


class TuningMode(enum.StrEnum):
    """How quantizers compute in the tuning phase; see `TrainConfig.tuning`."""

    HARD = "hard"
    NOISE = "noise"


def _check_finite(config: TrainConfig | FloatConfig, section: str) -> None:
    """Raise `UserError` if a field is infinite or NaN."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{section}.{field.name.rstrip('_')}: {value} is not a finite number")


def _check(condition: bool, key: str, message: str) -> None:
    """Raise `UserError` with a message about `key` unless `condition` is true."""
    if not condition:
        raise UserError(f"{key}: {message}")


def _check_choice(value: str | None, allowed: Iterable[str], key: str) -> None:
    """Raise `UserError` unless `value` is one of the allowed values."""
    names = list(allowed)
    _check(value in names, key, f"unknown value {value!r}; use {' or '.join(names)}")


def _check_common(config: TrainConfig | FloatConfig, section: str) -> None:
    """Validate the fields that both configurations have; raise `UserError` if one is invalid."""
    _check_finite(config, section)
    _check(0 < config.epochs <= 1e6, f"{section}.epochs", "must be above 0 and at most 1,000,000")
    for name in ("batch_size", "accumulate"):
        _check(getattr(config, name) >= 1, f"{section}.{name}", "must be at least 1")
    _check(config.lr > 0, f"{section}.lr", "must be above 0")
    for name in ("weight_decay", "grad_clip"):
        _check(getattr(config, name) >= 0, f"{section}.{name}", "must not be negative")
    for name in ("momentum", "ema"):
        _check(
            0 <= getattr(config, name) < 1, f"{section}.{name}", "must be at least 0 and below 1"
        )
    _check(0 <= config.warmup <= 1, f"{section}.warmup", "must be between 0 and 1")
    _check_choice(config.optimizer, OPTIMIZERS, f"{section}.optimizer")
    _check_choice(config.precision, PRECISIONS, f"{section}.precision")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings for training a trial.

    Over both phases together, the learning rate warms up and then follows a cosine decay.

    Attributes:
        epochs: passes over the training split, in both phases together; may be fractional.
        batch_size: samples per batch.
        accumulate: batches per optimizer step; the loss of a step is the mean of their losses.
        lr: peak learning rate of the weights.
        lr_bits: learning rate of the bit-widths, as a multiple of `lr`.
        lr_boundaries: learning rate of the truncation boundaries, as a multiple of `lr`.
        optimizer: `sgd`, or `adamw` with betas 0.9 and 0.999 and an epsilon of 1e-8.
        momentum: Nesterov momentum of `sgd`; ignored by `adamw`.
        weight_decay: weight decay, applied to parameters with two or more dimensions.
        lambda_: strength of the smooth-L1 penalty on cost / target (`lambda` in sweep files).
        noise_share: fraction of the steps in the noise phase, in [0, 1].
        warmup: fraction of the steps over which the learning rate rises from a tenth of its peak.
        distill: whether to distill from the task's own teacher or, if it has none, from the float
            model.
        distill_weight: weight w of the distillation loss, in [0, 1]; the task loss has the weight
            1 - w.
        proxy: distribution of the noise, `uniform` or `empirical`; None uses `quant.proxy`.
        start: where bit-widths start. `budget`: at the uniform width whose cost equals the
            budget (tensors that the budget does not count: at their largest width), or at the
            widths of the trial's parent if these satisfy the budget and use at least 97 % of it;
            `parent`: at the widths of the trial's parent, all changed by the
            same amount if they exceed the budget or use less than 97 % of it (without a parent,
            the same as `budget`); `sensitivity`: at the widths with the least measured loss within
            the budget; `config`: at `quant.start_bits`; `uniform`: at the largest single width
            within the budget, which is kept until the end. If widths are not learned or there is
            no noise phase, these starting values are projected onto the budget.
        fit_ranges: whether truncation boundaries start at the values that minimize the squared
            rounding error at the starting bit-widths; meant for NIPQ, since LSQ has its own
            initialization. Boundaries inherited from a parent with a different width are always
            rescaled.
        score_batches: number of batches on which the scores for `sensitivity` are measured, once
            per sweep.
        calibration_batches: number of batches used to calibrate the activation boundaries.
        norm_batches: number of batches used to re-estimate the normalization statistics at the
            end; 0 keeps the statistics from training.
        dampening: strength of a penalty that pulls weights towards their grid points in the
            tuning phase, to reduce oscillation; 0 disables it.
        freezing: oscillation frequency, in reversals per step, above which a weight is frozen at
            its most frequent grid point in the tuning phase; 0 disables freezing.
        tuning: forward pass of the quantizers in the tuning phase: `hard` rounds with the
            straight-through estimator; `noise` (NIPQ and DiffQ) adds noise one step wide at the
            frozen widths. Evaluation always rounds.
        grad_clip: maximum norm of the gradient; 0 disables clipping.
        precision: precision of forward passes and losses, in training and validation: `float32`,
            or `bfloat16` by autocast. Parameters and quantizers stay in float32.
        ema: decay of the moving average of the weights over the tuning phase. Validation and the
            stored model use the average; 0 disables averaging. See `Average` for the warm-up of
            the decay.
        checkpoint_minutes: maximum time between two checkpoints, in minutes; every epoch also
            ends with a checkpoint.
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
        """Validate every field; raise `UserError` if one is invalid."""
        _check_common(self, "train")
        for name in ("lr_bits", "lr_boundaries", "checkpoint_minutes"):
            _check(getattr(self, name) > 0, f"train.{name}", "must be above 0")
        _check(self.lambda_ >= 0, "train.lambda", "must not be negative")
        for name in ("dampening", "freezing"):
            _check(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        _check_choice(self.tuning, TuningMode, "train.tuning")
        for name in ("noise_share", "distill_weight"):
            _check(0 <= getattr(self, name) <= 1, f"train.{name}", "must be between 0 and 1")
        if self.proxy is not None:
            _check_choice(self.proxy, Proxy, "train.proxy")
        _check_choice(self.start, BitStart, "train.start")
        _check(self.score_batches >= 1, "train.score_batches", "must be at least 1")
        _check(self.calibration_batches >= 1, "train.calibration_batches", "must be at least 1")
        _check(self.norm_batches >= 0, "train.norm_batches", "must not be negative")

    def with_hyperparameters(self, params: Mapping[str, Any]) -> TrainConfig:
        """Return a copy in which a trial's hyperparameters replace the fields that they set.

        Raises:
            UserError: a name is unknown, or a value is invalid.
        """
        fields = {}
        for name, value in params.items():
            if name not in HYPERPARAMETERS:
                raise UserError(f"search.space.{name}: unknown{nearest(name, HYPERPARAMETERS)}")
            fields[HYPERPARAMETERS[name]] = value
        return dataclasses.replace(self, **fields)


@dataclass(frozen=True, kw_only=True)
class FloatConfig:
    """Settings for the float model, which is trained once per sweep or loaded from a file.

    Attributes:
        epochs: passes over the training split; may be fractional.
        batch_size: samples per batch.
        accumulate: batches per optimizer step; the loss of a step is the mean of their losses.
        lr: peak learning rate.
        weight_decay: weight decay, applied to parameters with two or more dimensions.
        optimizer: `sgd`, or `adamw` with betas 0.9 and 0.999 and an epsilon of 1e-8.
        momentum: Nesterov momentum of `sgd`; ignored by `adamw`.
        warmup: fraction of the steps over which the learning rate rises from a tenth of its peak.
        grad_clip: maximum norm of the gradient; 0 disables clipping.
        precision: precision of forward passes and losses, in training and validation: `float32`,
            or `bfloat16` by autocast. Parameters stay in float32.
        ema: decay of the moving average of the weights. Validation and the stored model use the
            average; 0 disables averaging. See `Average` for the warm-up of the decay.
        checkpoint: file with a state dict to load instead of training; None trains the model.
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
        """Validate every field; raise `UserError` if one is invalid."""
        _check_common(self, "float")

    def as_training(self) -> TrainConfig:
        """Return the `TrainConfig` with which the training loop trains the float model."""
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
