"""Calibration: grids, initial boundaries, and the state that must stay unchanged."""

from __future__ import annotations

import random

import pytest
import torch
from quant_models import OneLayer, images, normal, residual_net
from torch import nn

from nipq_search.errors import UserError
from nipq_search.quant import (
    ActivationConfig,
    QuantConfig,
    Start,
    WeightConfig,
    prepare,
    reestimate_norm_stats,
)
from nipq_search.quant import quantizers as find_quantizers
from nipq_search.quant.numerics.functional import Grid, hard_quantize, quantization_range
from nipq_search.quant.quantizers.statistics import Observer, weight_statistics


def input_quantizer(before, config=None, x=None):
    x = normal(512, 64) * 2 if x is None else x
    model = prepare(OneLayer(before), x[:1], config, [x, x])
    return find_quantizers(model)["linear.input"]


@pytest.mark.parametrize(
    ("before", "grid", "minimum"),
    [
        (nn.ReLU(), Grid.UNSIGNED, 0.0),
        (nn.ReLU6(), Grid.UNSIGNED, 0.0),
        (nn.SiLU(), Grid.AFFINE, -0.27846),
        (nn.GELU(), Grid.AFFINE, -0.16997),
        (nn.GELU(approximate="tanh"), Grid.AFFINE, -0.17004),
        (nn.Hardswish(), Grid.AFFINE, -0.375),
        (nn.LeakyReLU(0.01), Grid.AFFINE, None),
        (nn.ELU(), Grid.AFFINE, None),
        (nn.LayerNorm(64), Grid.SIGNED, 0.0),
        (nn.Tanh(), Grid.SIGNED, 0.0),
        (nn.Identity(), Grid.SIGNED, 0.0),
    ],
    ids=lambda value: str(value),
)
def test_calibration_chooses_the_grid(before, grid, minimum):
    quantizer = input_quantizer(before)
    assert quantizer.grid is grid
    if minimum is not None:
        assert float(quantizer.minimum) == pytest.approx(minimum, abs=2e-3)


def test_shifted_layer_norm_is_affine():
    norm = nn.LayerNorm(64)
    with torch.no_grad():
        norm.bias.fill_(2.0)
    assert input_quantizer(norm).grid is Grid.AFFINE


def test_one_bit_keeps_off_signed_grids():
    config = QuantConfig(activations=ActivationConfig(bits=(1, 2, 4)))
    assert input_quantizer(nn.Identity(), config).grid is Grid.AFFINE


def test_boundary_is_the_percentile():
    x = torch.rand(100, 64, generator=torch.Generator().manual_seed(0))
    config = QuantConfig(activations=ActivationConfig(percentile=0.9))
    quantizer = input_quantizer(nn.Identity(), config, x)
    assert quantizer.grid is Grid.UNSIGNED
    assert float(quantizer.alpha().detach()) == pytest.approx(0.9, abs=0.01)


def test_observer_copes_with_everything():
    observer = Observer()
    for values in ([], [float("nan"), float("inf"), 1.0, 0.0], [0.0] * 9999):
        observer(torch.tensor(values))
    found = observer.statistics(0.999, True)
    assert found.grid is Grid.UNSIGNED and float(found.alpha) == 1.0
    assert float(Observer().statistics(0.999, True).alpha) == 1.0
    zeros = Observer()
    zeros(torch.zeros(10))
    assert float(zeros.statistics(0.999, True).alpha) == 1.0
    negative = Observer()
    negative(-torch.rand(1000))
    assert negative.statistics(1.0, True).grid is Grid.AFFINE


def test_weight_boundaries_start_at_the_absolute_maximum():
    weight = normal(5, 3, 3, 3)
    weight[2] = 0.0
    rows = weight.abs().reshape(5, -1).amax(1)
    rows[2] = 1.0
    assert torch.equal(weight_statistics(weight, True, False).alpha, rows)
    assert torch.equal(weight_statistics(weight, False, False).alpha, weight.abs().max()[None])


def test_mse_start_has_the_least_error():
    weight = normal(4, 500)
    found = weight_statistics(weight, True, True).alpha

    def error(alpha):
        range_ = quantization_range(
            alpha[:, None], torch.tensor([4.0]), Grid.SIGNED, torch.zeros(1)
        )
        return (hard_quantize(weight, range_) - weight).square().sum(1)

    for share in (0.9, 1.1, 1.5):
        assert (error(found) <= error(found * share)).all()
    config = QuantConfig(weights=WeightConfig(start=Start.MSE))
    model = prepare(nn.Linear(500, 4), normal(2, 500), config)
    assert (model.weight_quantizer.alpha() <= model.weight.abs().amax(1)).all()


def test_calibration_leaves_generators_modes_and_the_model_alone():
    model = residual_net()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    modes = []

    def calibrate(prepared):
        modes.append(any(m.training for m in prepared.modules()))
        torch.rand(10)
        prepared(images())

    prepared = prepare(model, images(), calibration=calibrate)
    assert modes == [False]
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert prepared.training and not prepared.norm.training
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(torch.equal(before[n], prepared.state_dict()[n]) for n in before)


def test_calibration_sees_the_float_model():
    model = OneLayer(nn.Linear(64, 64))
    x = normal(64, 64)
    prepared = prepare(model, x, QuantConfig(weights=WeightConfig(bits=(2,))), [(x, "label")])
    expected = Observer()
    with torch.no_grad():
        expected(model.before(x))
    found = find_quantizers(prepared)["linear.input"].alpha().detach()
    assert torch.allclose(found, expected.statistics(0.999, True).alpha)


def test_calibration_without_data_is_refused():
    for nothing in ([], lambda model: None):
        with pytest.raises(UserError, match="calibration: no data"):
            prepare(residual_net(), images(), calibration=nothing)


def test_norm_statistics_are_averages_over_the_batches():
    model = prepare(residual_net(), images())
    batches = [images(seed, batch=8) for seed in range(3)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert reestimate_norm_stats(model, batches) is model
    assert torch.equal(state, torch.get_rng_state())
    assert model.norm.momentum == 0.1 and model.training
    assert int(model.norm.num_batches_tracked) == 3
    model.eval()
    with torch.no_grad():
        means = torch.stack([model.stem(batch).mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, means)
    again = model.norm.running_mean.clone()
    reestimate_norm_stats(model, lambda m: [m(batch) for batch in batches] and None)
    torch.testing.assert_close(model.norm.running_mean, again)


def test_norm_statistics_need_data():
    with pytest.raises(UserError, match="no batch reached"):
        reestimate_norm_stats(prepare(residual_net(), images()), [])
    plain = nn.Linear(2, 2)
    assert reestimate_norm_stats(plain, []) is plain


@pytest.mark.parametrize(
    "values",
    [
        normal(4000),
        normal(4000).relu(),
        nn.functional.gelu(3 * normal(4000)),
        torch.cat([normal(4000), torch.tensor([60.0, -45.0])]),
    ],
    ids=["signed", "unsigned", "affine", "outliers"],
)
def test_activations_may_start_where_the_error_is_least(values):
    observer = Observer()
    observer(values)
    wide, best = (observer.statistics(1.0, True, mse) for mse in (False, True))
    assert best.grid is wide.grid

    def error(share):
        range_ = quantization_range(
            best.alpha * share, torch.tensor([4.0]), best.grid, best.minimum * share
        )
        return float((hard_quantize(values, range_) - values).square().sum())

    assert error(1.0) <= min(error(share) for share in (0.8, 0.95, 1.05, 1.2))
    config = QuantConfig(activations=ActivationConfig(start="mse", percentile=1.0))
    model = prepare(nn.Linear(1, 1), values[:, None], config)
    torch.testing.assert_close(model.input_quantizer.alpha().detach(), best.alpha)
