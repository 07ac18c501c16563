"""Options of the tuning phase: iterative weight freezing, and noise until the end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_train_oscillation import layer, place, step_of
from train_tasks import CPU, digits_spec, interrupted, outcome

from nipq_search.quant import quantizers
from nipq_search.quant.quantizers.base import FakeQuantizer
from nipq_search.train import Hooks, train
from nipq_search.train.stability.freezing import Freezing
from nipq_search.train.stability.oscillation import MOMENTUM


def test_an_oscillating_weight_is_fixed_at_its_most_frequent_grid_point():
    model, freezing = layer(), Freezing(2.5 * MOMENTUM)
    assert freezing.share() is None
    # The first weight oscillates, mostly at 2; the second rises; the third always rounds to 0.
    for number in range(12):
        oscillating = 1.0 if number % 3 == 1 else 2.0
        place(model, oscillating, 0.5 * number, 0.2)
        freezing.update(model)
    weight = model[0].weight.detach().view(-1)[:3] / step_of(model)
    assert weight.tolist() == pytest.approx([2.0, 5.5, 0.2], abs=1e-5)
    assert freezing.share() == 1 / 32
    place(model, 7.0, 7.0)
    freezing.update(model)
    weight = model[0].weight.detach().view(-1)[:2] / step_of(model)
    assert weight.tolist() == pytest.approx([2.0, 7.0], abs=1e-5), "the weight stays fixed"


def test_a_fixed_weight_follows_its_boundary():
    model, freezing = layer(), Freezing(1.5 * MOMENTUM)
    for number in range(6):
        place(model, float(number % 2))
        freezing.update(model)
    assert freezing.share() == 1 / 32
    at = float(model[0].weight.detach().view(-1)[0]) / step_of(model)
    model[0].weight_quantizer.scale_range(torch.tensor([2.0]))
    freezing.update(model)
    again = float(model[0].weight.detach().view(-1)[0]) / step_of(model)
    assert again == pytest.approx(at, abs=1e-5) and at in (0.0, 1.0)


def curve_of(digits, float_model, folder, **changes):
    curve = []
    changes = {"epochs": 4, "noise_share": 0.0, "lr": 0.05} | changes
    spec = digits_spec(float_model, **changes)
    spec = dataclasses.replace(spec, seed=3)
    result = train(digits, spec, folder, CPU, Hooks(on_epoch=curve.append))
    return result, [point.metrics for point in curve]


def test_freezing_ends_oscillation(float_model, digits, tmp_path):
    _, plain = curve_of(digits, float_model, tmp_path / "plain", epochs=25)
    _, frozen = curve_of(digits, float_model, tmp_path / "frozen", epochs=25, freezing=0.011)
    assert "fixed_weights" not in plain[-1]
    fixed = [metrics["fixed_weights"] for metrics in frozen]
    assert fixed == sorted(fixed) and 0 < fixed[-1] < 1
    assert frozen[-1]["oscillating_weights"] < 0.5 * plain[-1]["oscillating_weights"]


def test_noise_tuning_rounds_only_in_evaluation(float_model, digits, tmp_path, monkeypatch):
    hard, noisy = set(), set()
    before = FakeQuantizer.forward

    def forward(self, x, axis=0, rows=None):
        found = before(self, x, axis, rows)
        if self.training and self.observer is None and self.bits.is_frozen:
            levels = len(torch.unique(found.detach()))
            (hard if levels <= 2 ** self.bits.hard() * self.channels else noisy).add(self.name)
        return found

    monkeypatch.setattr(FakeQuantizer, "forward", forward)
    result, _ = curve_of(digits, float_model, tmp_path / "noise", tuning="noise")
    assert noisy and result.metrics["accuracy"] > 0.2, "more than twice the chance level"
    seen = len(noisy)
    noisy.clear()
    curve_of(digits, float_model, tmp_path / "hard")
    assert not noisy and hard and seen > 0.5 * len(hard)


def test_quantizers_round_again_after_training(float_model, digits, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(
        "nipq_search.train.trial.reestimate_norm_stats",
        lambda model, batches: kept.extend(quantizers(model).values()),
    )
    curve_of(digits, float_model, tmp_path, tuning="noise")
    assert kept and all(quantizer.rounds_once_frozen for quantizer in kept)


@pytest.mark.parametrize("changes", [{"freezing": 0.011}, {"tuning": "noise"}])
@pytest.mark.parametrize("steps", [13, 20])
def test_an_interrupted_training_ends_the_same(changes, steps, float_model, digits, tmp_path):
    spec = digits_spec(float_model, noise_share=0.2, **changes)
    whole = train(digits, spec, tmp_path / "whole", CPU)
    interrupted(digits, spec, tmp_path / "cut", steps)
    assert outcome(train(digits, spec, tmp_path / "cut", CPU)) == outcome(whole)
