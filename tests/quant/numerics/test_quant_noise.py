"""Noise: distribution, independence, and dependence on (seed, step, tensor, element) only."""

from __future__ import annotations

import copy

import pytest
import torch
from quant_models import distance, images, normal, residual_cdf, residual_net
from torch import nn
from torch.utils.checkpoint import checkpoint

from nipq_search.quant import Proxy, QuantConfig, prepare, quantizers
from nipq_search.quant.numerics import functional as F
from nipq_search.quant.numerics.functional import Grid
from nipq_search.quant.numerics.noise import (
    centered_uniform,
    drawn_from,
    mix,
    residuals_of,
    uniform_noise,
)

CPU = torch.device("cpu")


def residual_noise(x, step, low, high, key):
    return drawn_from(residuals_of(x, step, low, high), x.shape, key)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grid", [Grid.SIGNED, Grid.UNSIGNED])
def test_empirical_noise_follows_the_exact_residual_law(grid, bits):
    x = normal(100_000 if grid is Grid.SIGNED else 200_000, seed=bits)
    range_ = F.quantization_range(
        torch.tensor([1.7]), torch.tensor([float(bits)]), grid, torch.zeros(1)
    )
    noise = residual_noise(x, range_.step, range_.low, range_.high, mix(5, bits))
    inside = (x > range_.low) & (x < range_.high)
    own = (x / range_.step).round() - x / range_.step
    noise, own = noise[inside], own[inside]
    assert distance(noise[:100_000], residual_cdf(range_)) < 0.01
    # The noise is independent of the value, magnitude and sign of the element's own residual.
    for a, b in [(noise, own), (noise.abs(), own.abs()), (noise.sign(), own.sign())]:
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.015


def test_empirical_noise_of_per_channel_boundaries():
    x = normal(8, 20_000) * torch.arange(1, 9)[:, None]
    alpha = 1.7 * torch.arange(1.0, 9.0)[:, None]
    range_ = F.quantization_range(alpha, torch.tensor([3.0]), Grid.SIGNED, torch.zeros(1))
    noise = residual_noise(x, range_.step, range_.low, range_.high, mix(1))
    one = F.quantization_range(
        torch.tensor([1.7]), torch.tensor([3.0]), Grid.SIGNED, torch.zeros(1)
    )
    assert distance(noise.reshape(-1)[:100_000], residual_cdf(one)) < 0.01


def test_uniform_noise_is_uniform_and_centered():
    for dtype in (torch.float32, torch.float64):
        noise = uniform_noise(torch.Size([100, 1000]), mix(3), CPU, dtype)
        assert noise.dtype is dtype
        assert distance(noise.reshape(-1), lambda t: t + 0.5) < 0.01
        assert abs(float(noise.mean())) < 0.003
    huge = uniform_noise(torch.Size([5_000_000]), mix(4), CPU, torch.float32)
    assert abs(float(huge.mean())) < 1e-3 and float(huge.abs().max()) <= 0.5


def test_centered_uniform_is_open_and_unbiased():
    draws = [centered_uniform(7, k) for k in range(20_000)]
    assert -0.5 < min(draws) and max(draws) < 0.5
    assert distance(torch.tensor(draws), lambda t: t + 0.5) < 0.012


def test_noise_is_independent_across_tensors_and_steps():
    shape = torch.Size([50_000])
    keys = [mix(0, step, tensor, 1) for step in range(4) for tensor in range(4)]
    rows = torch.stack([uniform_noise(shape, key, CPU, torch.float64) for key in keys])
    off = torch.corrcoef(rows) - torch.eye(len(rows))
    assert float(off.abs().max()) < 0.025
    assert torch.equal(rows[3], uniform_noise(shape, keys[3], CPU, torch.float64))


@pytest.mark.parametrize("proxy", list(Proxy))
def test_noise_is_a_function_of_seed_and_step(proxy):
    config = QuantConfig(proxy=proxy, seed=3)
    a, b = (prepare(residual_net(), images(), config) for _ in range(2))
    torch.manual_seed(1)
    first = a(images())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, b(images()))
    assert torch.equal(state, torch.get_rng_state())
    second = a(images())
    assert not torch.equal(first, second)
    a.quant_state.clock.step = 0
    a.norm.load_state_dict(residual_net().norm.state_dict())
    assert torch.equal(first, a(images()))
    c = prepare(residual_net(), images(), QuantConfig(proxy=proxy, seed=4))
    assert not torch.equal(first, c(images()))


def test_evaluation_moves_no_clock():
    model = prepare(residual_net(), images()).eval()
    assert torch.equal(model(images()), model(images()))
    assert model.quant_state.clock.step == 0


class Blocks(nn.Module):
    """A model that calls one block twice, optionally with recomputation in the backward pass."""

    def __init__(self, recompute: bool, reentrant: bool = False) -> None:
        super().__init__()
        self.block = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)
        self.recompute, self.reentrant = recompute, reentrant

    def forward(self, x):
        for _ in range(2):
            if self.recompute:
                x = checkpoint(self.block, x, use_reentrant=self.reentrant)
            else:
                x = self.block(x)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("proxy", list(Proxy))
def test_recomputation_sees_the_same_noise(proxy, reentrant):
    x = normal(5, 6).requires_grad_()
    plain = prepare(Blocks(False), x.detach(), QuantConfig(proxy=proxy))
    thrifty = copy.deepcopy(plain)
    thrifty.recompute, thrifty.reentrant = True, reentrant
    for _ in range(2):
        outputs = [plain(x), thrifty(x)]
        for y in outputs:
            y.square().sum().backward()
        assert torch.equal(*outputs)
    for a, b in zip(plain.parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for name, quantizer in quantizers(plain).items():
        torch.testing.assert_close(
            quantizer.bits.marginal, quantizers(thrifty)[name].bits.marginal
        )


def test_a_module_called_twice_draws_once():
    model = prepare(nn.Sequential(nn.Linear(6, 6)), normal(5, 6))
    layer = model[0]
    model(normal(5, 6))
    assert torch.equal(layer(normal(5, 6)), layer(normal(5, 6)))
    assert model.quant_state.clock.step == 1


@pytest.mark.parametrize("proxy", list(Proxy))
def test_a_dead_relu_works(proxy):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    prepared = prepare(model, normal(3, 4), QuantConfig(proxy=proxy))
    prepared(normal(3, 4)).sum().backward()
    for parameter in prepared.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    step = torch.tensor([0.5])
    nothing = residual_noise(torch.zeros(7), step, torch.zeros(1), step, 1)
    assert torch.equal(nothing, torch.zeros(7))
