"""Properties of pseudo-quantization noise as a proxy for rounding, on which NIPQ relies."""

from __future__ import annotations

import math

import pytest
import torch
from quant_models import normal

from nipq_search.quant.numerics import functional as F
from nipq_search.quant.numerics.functional import Grid
from nipq_search.quant.numerics.noise import mix, uniform_noise

ZERO = torch.zeros(1, dtype=torch.float64)


def signed(alpha, bits):
    return F.quantization_range(alpha, bits, Grid.SIGNED, ZERO)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_straight_through_hops_and_the_proxy_settles():
    """Minimize (y - target)**2 / 2 for a scalar, with the target between two grid points."""
    range_ = signed(f64(1.0), f64(3.0))  # step 1/3
    target = 0.45
    hops, settled = [], []
    w = f64(0.2).requires_grad_()
    for _ in range(400):
        y = F.hard_quantize(w, range_)
        (grad,) = torch.autograd.grad(((y - target) ** 2 / 2).sum(), w)
        w = (w - 0.1 * grad).detach().requires_grad_()
        hops.append(round(float(y.detach()), 6))
    assert set(hops[-100:]) == {round(1 / 3, 6), round(2 / 3, 6)}
    w = f64(0.2).requires_grad_()
    for step in range(4000):
        noise = uniform_noise(torch.Size([1]), mix(step), torch.device("cpu"), torch.float64)
        y = F.pseudo_quantize(w, range_, noise)
        (grad,) = torch.autograd.grad(((y - target) ** 2 / 2).sum(), w)
        w = (w - 0.1 * grad).detach().requires_grad_()
        settled.append(float(w.detach()))
    assert sum(settled[500:]) / 3500 == pytest.approx(target, abs=0.005)


def quadratic(dimension=8):
    """Return a quadratic loss with a random positive Hessian, and antithetic pairs of noise."""
    root = normal(dimension, dimension, seed=1, dtype=torch.float64)
    hessian = root @ root.T
    noise = torch.rand(
        100_000, dimension, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    noise = torch.cat([noise - 0.5, 0.5 - noise])
    x = normal(dimension, seed=3, dtype=torch.float64) * 0.3
    return hessian, noise, x


def test_noise_adds_curvature_to_the_loss():
    hessian, noise, x = quadratic()
    range_ = signed(f64(2.0), f64(4.0))
    y = F.pseudo_quantize(x.expand_as(noise), range_, noise)
    mean = ((y @ hessian) * y).sum(1).mean() / 2
    added = mean - x @ hessian @ x / 2
    expected = float(range_.step) ** 2 / 24 * hessian.trace()
    assert float(added) == pytest.approx(float(expected), rel=0.01)


@pytest.mark.parametrize("width", [2.0, 3.3, 5.0])
def test_layers_with_more_curvature_win_bits(width):
    hessian, noise, x = quadratic()
    bits = f64(width).requires_grad_()
    range_ = signed(f64(2.0), bits)
    y = F.pseudo_quantize(x.expand_as(noise), range_, noise)
    (((y @ hessian) * y).sum(1).mean() / 2).backward()
    power = 2 ** (width - 1)
    step = 2.0 / (power - 1)
    expected = -(step**2) / 12 * math.log(2) * power / (power - 1) * float(hessian.trace())
    assert float(bits.grad) == pytest.approx(expected, rel=0.01)


def density(law):
    """Return a fine lattice on the positive axis and its quadrature weights."""
    x = (torch.arange(40_000, dtype=torch.float64) + 0.5) * (24 / 40_000)
    weight = torch.exp(-x.square() / 2) if law == "gaussian" else torch.exp(-x * 2**0.5)
    return x, weight / weight.sum()


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
@pytest.mark.parametrize(
    ("bits", "distance"), [(2, 0.07), (3, 0.02), (4, 0.01), (5, 0.01), (6, 0.01), (8, 0.01)]
)
def test_stationary_boundary_is_the_true_quantizers_best(law, bits, distance):
    x, weight = density(law)
    width = f64(float(bits))
    # The slope is quadratic in the noise, so only the second moment, 1 / 12, matters.
    noise = torch.full_like(x, 12**-0.5)

    def slope(value):
        alpha = f64(value).requires_grad_()
        y = F.pseudo_quantize(x, signed(alpha, width), noise)
        (grad,) = torch.autograd.grad((weight * (y - x).square()).sum(), alpha)
        return float(grad)

    def error(value):
        y = F.hard_quantize(x, signed(f64(value), width))
        return float((weight * (y - x).square()).sum())

    low, high = 0.3, 16.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    near = [low * (0.85 + 0.3 * k / 300) for k in range(301)]
    best = min(near, key=error)
    assert best == pytest.approx(low, rel=distance)
    assert error(low) <= 1.015 * error(best)
