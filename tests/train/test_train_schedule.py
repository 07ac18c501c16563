"""Phases and learning rates; error messages of invalid configurations."""

from __future__ import annotations

import dataclasses
import math

import pytest

from nipq_search.errors import UserError
from nipq_search.train import HYPERPARAMETERS, FloatConfig, TrainConfig
from nipq_search.train.schedule import make_schedule


def schedule(**changes):
    options = {"epochs": 4, "batches_per_epoch": 25, "noise_share": 0.3, "warmup": 0.1}
    return make_schedule(**options | {"quantized": True, "learns_bits": True} | changes)


def phases(plan):
    return [plan.phase(step) for step in range(plan.total)]


def test_noise_then_tuning():
    assert phases(schedule()) == ["noise"] * 30 + ["tuning"] * 70
    assert phases(schedule(noise_share=0)) == ["tuning"] * 100
    assert phases(schedule(noise_share=1)) == ["noise"] * 100


def test_models_that_learn_no_bits_have_no_noise_phase():
    assert set(phases(schedule(learns_bits=False))) == {"tuning"}
    assert set(phases(schedule(quantized=False))) == {"float"}


def test_steps_of_several_batches():
    plan = schedule(accumulate=4)
    assert (plan.batches_per_epoch, plan.steps_per_epoch) == (25, 7)
    assert (plan.total, plan.noise, plan.warmup) == (28, 8, 3)
    assert schedule(accumulate=100).total == 4
    assert schedule(accumulate=4, epochs=0.5).total == 4


def test_fractions_of_an_epoch():
    assert schedule(epochs=0.5).total == 12
    assert schedule(epochs=1e-6).total == 1


def test_the_rate_rises_from_a_tenth_and_falls_to_a_thousandth():
    plan = schedule()
    rates = [plan.rate(step) for step in range(plan.total + 1)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx((1 + 1e-3) / 2)
    assert rates[-1] == pytest.approx(1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert plan.rate(plan.total + 50) == pytest.approx(1e-3)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_no_warm_up_and_nothing_else(warmup):
    plan = schedule(warmup=warmup)
    assert all(0 < plan.rate(step) <= 1 and math.isfinite(plan.rate(step)) for step in range(101))
    assert plan.rate(0) == pytest.approx(0.1 if warmup else 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", float("nan")),
        ("epochs", float("inf")),
        ("batch_size", 0),
        ("accumulate", 0),
        ("lr", 0),
        ("lr", float("inf")),
        ("lr_bits", -1),
        ("lr_boundaries", 0),
        ("momentum", 1),
        ("momentum", -0.1),
        ("weight_decay", -1),
        ("noise_share", 1.1),
        ("warmup", -0.1),
        ("distill_weight", 2),
        ("proxy", "gaussian"),
        ("start", "warm"),
        ("optimizer", "adam"),
        ("precision", "float16"),
        ("ema", 1),
        ("ema", -0.1),
        ("calibration_batches", 0),
        ("norm_batches", -1),
        ("grad_clip", -1),
        ("checkpoint_minutes", 0),
    ],
)
def test_wrong_values_name_their_key(field, value):
    with pytest.raises(UserError, match=f"^train.{field}: ") as caught:
        TrainConfig(**{field: value})
    assert "\n" not in str(caught.value)


def test_lambda_is_named_as_in_files():
    with pytest.raises(UserError, match="^train.lambda: "):
        TrainConfig(lambda_=-1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("batch_size", 0), ("lr", -1), ("weight_decay", -1), ("warmup", 2)]
    + [
        ("momentum", 1),
        ("accumulate", 0),
        ("optimizer", "adam"),
        ("precision", "float16"),
        ("ema", 1),
        ("ema", -0.1),
        ("grad_clip", -1),
        ("grad_clip", float("nan")),
    ],
)
def test_wrong_values_of_the_float_training_name_their_key(field, value):
    with pytest.raises(UserError, match=f"^float.{field}: "):
        FloatConfig(**{field: value})


def test_the_float_training_has_no_phases_and_no_teacher():
    training = FloatConfig(epochs=3, lr=0.2, warmup=0.1).as_training()
    assert (training.epochs, training.lr, training.warmup) == (3, 0.2, 0.1)
    assert not training.distill and training.noise_share == 0


def test_the_float_training_receives_all_shared_settings():
    options = {
        "accumulate": 3,
        "optimizer": "adamw",
        "precision": "bfloat16",
        "ema": 0.9,
        "grad_clip": 0.5,
        "momentum": 0.8,
        "weight_decay": 0.2,
    }
    training = FloatConfig(**options).as_training()
    assert {name: getattr(training, name) for name in options} == options
    common = {field.name for field in dataclasses.fields(FloatConfig)} - {"checkpoint"}
    assert common - {"epochs", "batch_size", "lr", "warmup"} == options.keys()


def test_hyperparameters_set_their_fields():
    config = TrainConfig().with_hyperparameters({"lr": 0.5, "lambda": 3, "proxy": "empirical"})
    assert (config.lr, config.lambda_, config.proxy) == (0.5, 3, "empirical")
    assert all(hasattr(config, field) for field in HYPERPARAMETERS.values())
    with pytest.raises(UserError, match=r"lamda.*did you mean 'lambda'"):
        config.with_hyperparameters({"lamda": 3})
    with pytest.raises(UserError, match=r"^train.lr: "):
        config.with_hyperparameters({"lr": -1})
