"""Oscillating weights: their measurement, their share in the curve, and dampening."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from train_tasks import CPU, digits_spec

from nipq_search.quant import QuantConfig, WeightConfig, prepare
from nipq_search.quant.insertion.prepare import freeze_bits
from nipq_search.train import Hooks, train
from nipq_search.train.stability.oscillation import MOMENTUM, Oscillation, dampening


def layer(wrapped=True):
    config = QuantConfig(weights=WeightConfig(bits=(4,), granularity="per_tensor"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4)) if wrapped else nn.Linear(8, 4)
    return freeze_bits(prepare(model, torch.randn(3, 8), config))


def step_of(model):
    return float(model[0].weight_quantizer.boundary_for(model[0].weight).range(2).step.detach())


def place(model, *levels):
    """Set the first weights to these multiples of the step."""
    step = step_of(model)
    with torch.no_grad():
        model[0].weight.view(-1)[: len(levels)] = torch.tensor(levels) * step


def test_only_reversals_count():
    model, seen = layer(), Oscillation()
    assert seen.share() is None
    place(model, 0.0, 0.0, 0.0, 0.0)
    seen.update(model)
    assert seen.share() == 0.0
    # Integers of the four weights: oscillating, rising, constant, changing once.
    for levels in ((1.0, 1.0, 0.2, 1.0), (0.0, 2.0, 0.4, 1.0), (1.0, 3.0, -0.4, 1.0)):
        place(model, *levels)
        seen.update(model)
    frequency = seen.frequencies
    assert frequency[0] == pytest.approx(MOMENTUM * (2 - MOMENTUM))
    assert frequency[1:].abs().max() == 0
    assert seen.share() == 1 / 32


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_grid_integers_are_tracked(granularity):
    config = QuantConfig(weights=WeightConfig(bits=(3,), granularity=granularity))
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)]
    if granularity == "per_channel":
        layers.append(nn.ConvTranspose2d(4, 4, 2))  # skipped: channels not in dimension 0
    model = nn.Sequential(*layers)
    model = freeze_bits(prepare(model, torch.randn(1, 3, 6, 6), config))
    seen = Oscillation()
    seen.update(model)
    expected = [
        (conv.weight_quantizer(conv.weight) / step).round().flatten()
        for conv in (model[0], model[1])
        for step in [conv.weight_quantizer.boundary_for(conv.weight).range(4).step]
    ]
    assert torch.equal(seen.integers, torch.cat(expected).detach())


def test_a_single_layer_model_is_tracked():
    seen = Oscillation()
    seen.update(layer(wrapped=False))
    assert seen.share() == 0.0


def test_a_saved_state_continues(tmp_path):
    model, whole, half = layer(), Oscillation(), Oscillation()
    for number, level in enumerate((0.0, 1.0, 0.0, 1.0)):
        place(model, level)
        whole.update(model)
        if number == 2:
            loaded = Oscillation()
            loaded.load_state_dict(half.state_dict(), CPU)
            half = loaded
        half.update(model)
    assert torch.equal(whole.frequencies, half.frequencies)


def test_dampening_pulls_weights_to_their_grid_points():
    model = layer()
    place(model, 0.3, -1.4, 50.0)
    before = model[0].weight.detach().clone()
    loss = dampening(model)
    loss.backward()
    gradient = model[0].weight.grad.view(-1) / step_of(model)
    assert gradient[:3] == pytest.approx([0.6, -0.8, 0.0], abs=1e-5), "zero outside the range"
    assert torch.equal(model[0].weight, before)
    assert all(p.grad is None for p in model[0].weight_quantizer.parameters())
    with torch.no_grad():
        model[0].weight -= 0.5 * model[0].weight.grad
    assert float(dampening(model).detach()) < 0.01 * float(loss.detach())


def test_the_share_is_in_the_curve_and_dampening_lowers_it(float_model, digits, tmp_path):
    def trained(strength):
        curve = []
        spec = digits_spec(float_model, epochs=4, noise_share=0.0, lr=0.05, dampening=strength)
        spec = dataclasses.replace(spec, seed=3)
        train(digits, spec, tmp_path / str(strength), CPU, Hooks(on_epoch=curve.append))
        return [point.metrics["oscillating_weights"] for point in curve]

    plain, dampened = trained(0.0), trained(1.0)
    assert all(0 <= share <= 1 for share in plain) and plain[-1] > 0.01
    assert dampened[-1] < 0.8 * plain[-1]
