"""Pure functions: grids, gradients, rounding of bit-widths."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_models import WIDTHS, normal, plain_quantize

from nipq_search.quant.numerics import functional as F
from nipq_search.quant.numerics import widths
from nipq_search.quant.numerics.functional import Grid

LN2 = math.log(2.0)


def setting(grid, per_channel, seed=0):
    """Return x, alpha, bits, minimum and noise in float64; no element of x is near a kink."""
    x = normal(3, 40, seed=seed, dtype=torch.float64) * 1.5 + 0.3
    alpha = torch.tensor([1.1, 1.7, 2.3] if per_channel else [1.6], dtype=torch.float64)
    alpha = alpha[:, None] if per_channel else alpha
    bits = torch.tensor([3.4], dtype=torch.float64)
    minimum = torch.tensor([-0.4], dtype=torch.float64)
    range_ = F.quantization_range(alpha, bits, grid, minimum)
    for edge in (range_.low, range_.high):
        x = torch.where((x - edge).abs() < 1e-3, x + 0.01, x)
    noise = torch.rand(3, 40, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return x, alpha, bits, minimum, noise - 0.5


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("grid", list(Grid))
def test_gradients_agree_with_finite_differences(grid, per_channel):
    x, alpha, bits, minimum, noise = setting(grid, per_channel)

    def forward(x, alpha, bits):
        return F.pseudo_quantize(x, F.quantization_range(alpha, bits, grid, minimum), noise)

    inputs = [t.clone().requires_grad_() for t in (x, alpha, bits)]
    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("grid", [Grid.SIGNED, Grid.UNSIGNED])
def test_gradients_are_those_of_the_paper(grid, per_channel):
    x, alpha, bits, minimum, noise = setting(grid, per_channel)
    inputs = [t.clone().requires_grad_() for t in (x, alpha, bits)]
    range_ = F.quantization_range(inputs[1], inputs[2], grid, minimum)
    y = F.pseudo_quantize(inputs[0], range_, noise)
    got = torch.autograd.grad(y.sum(), inputs)
    b = float(bits)
    signed = grid is Grid.SIGNED
    levels = 2 ** (b - 1) - 1 if signed else 2**b - 1
    low = -alpha if signed else torch.zeros_like(alpha)
    above, below = x >= alpha, x <= low
    inside = ~(above | below)
    by_alpha = above.double() - signed * below.double() + inside * noise / levels
    power = 2 ** (b - 1) if signed else 2**b
    by_bits = inside * (-noise * alpha * LN2 * power / levels**2)
    torch.testing.assert_close(got[0], inside.double())
    torch.testing.assert_close(got[1], by_alpha.sum_to_size(alpha.shape))
    torch.testing.assert_close(got[2], by_bits.sum_to_size(bits.shape))


@pytest.mark.parametrize("grid", list(Grid))
def test_forward_of_the_proxy(grid):
    x, alpha, bits, minimum, noise = setting(grid, False)
    range_ = F.quantization_range(alpha, bits, grid, minimum)
    y = F.pseudo_quantize(x, range_, noise)
    inside = (x > range_.low) & (x < range_.high)
    torch.testing.assert_close(y[inside], (x + noise * range_.step)[inside])
    assert (y[x >= range_.high] == range_.high).all()
    assert (y[x <= range_.low] == range_.low).all()
    assert inside.any() and not inside.all()


@pytest.mark.parametrize(("grid", "bits"), WIDTHS)
def test_hard_quantizer_is_the_textbook_one(grid, bits):
    for seed in range(20):
        x = normal(500, seed=seed) * 2
        alpha = torch.rand(1, generator=torch.Generator().manual_seed(seed)) * 3 + 0.01
        minimum = -alpha * 0.3
        range_ = F.quantization_range(alpha, torch.tensor([float(bits)]), grid, minimum)
        y = F.hard_quantize(x, range_)
        assert torch.equal(y, plain_quantize(x, alpha, bits, grid, minimum))
        assert len(y.unique()) <= 2**bits
        assert torch.equal(F.hard_quantize(torch.zeros(1), range_), torch.zeros(1))
        torch.testing.assert_close(F.hard_quantize(y, range_), y)


@pytest.mark.parametrize("grid", list(Grid))
def test_hard_gradients_pass_straight_through(grid):
    x, alpha, _, minimum, _ = setting(grid, False)
    bits = torch.tensor([4.0], dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), alpha.clone().requires_grad_()]
    range_ = F.quantization_range(inputs[1], bits, grid, minimum)
    F.hard_quantize(inputs[0], range_).sum().backward()
    inside = (x > range_.low) & (x < range_.high)
    torch.testing.assert_close(inputs[0].grad, inside.double())
    # The derivative of the expression for the boundary, with all integers held fixed.
    integers = (x / range_.step).round()
    per_step = torch.where(inside, integers - x / range_.step, 0.0)
    per_step = torch.where(x >= range_.high, range_.highest, per_step)
    per_step = torch.where(x <= range_.low, range_.lowest, per_step)
    step_by_alpha = float((range_.step / inputs[1]).detach())
    torch.testing.assert_close(inputs[1].grad, per_step.sum().reshape(1) * step_by_alpha)


def test_affine_grid_holds_zero_and_its_ends():
    for bits in range(1, 15):
        range_ = F.quantization_range(
            torch.tensor([6.3]), torch.tensor([float(bits)]), Grid.AFFINE, torch.tensor([-0.278])
        )
        assert float(range_.lowest).is_integer() and float(range_.lowest) <= 0
        assert float(range_.highest - range_.lowest) == 2**bits - 1
        torch.testing.assert_close(range_.low, range_.lowest * range_.step)
        torch.testing.assert_close(range_.high, range_.highest * range_.step)


@settings(deadline=None)
@given(st.floats(1e-6, 1e4))
def test_softplus_inverse(value):
    v = torch.tensor([value], dtype=torch.float64)
    torch.testing.assert_close(torch.nn.functional.softplus(F.softplus_inverse(v)), v)
    assert F.softplus_inverse(v.float()).isfinite()


@settings(deadline=None)
@given(st.sets(st.integers(1, 16), min_size=2).map(lambda s: tuple(sorted(s))), st.floats(0, 1))
def test_theta_and_soft_bits_are_inverse_away_from_the_ends(allowed, share):
    bits = allowed[0] + (allowed[-1] - allowed[0]) * (0.05 + 0.9 * share)
    theta = torch.tensor([widths.theta_for(bits, allowed[0], allowed[-1])], dtype=torch.float64)
    assert float(widths.soft_bits(theta, allowed[0], allowed[-1])) == pytest.approx(bits)
    for end in (allowed[0], allowed[-1]):
        theta = torch.tensor([widths.theta_for(end, allowed[0], allowed[-1])])
        slope = torch.autograd.functional.jacobian(
            lambda t: widths.soft_bits(t, allowed[0], allowed[-1]), theta
        )
        assert float(slope) > 0.04 * (allowed[-1] - allowed[0])


@settings(deadline=None)
@given(
    st.sets(st.integers(1, 16), min_size=2).map(lambda s: tuple(sorted(s))),
    st.floats(0, 1),
    st.floats(-0.4999999, 0.4999999),
)
def test_sampled_bits_are_allowed_neighbours(allowed, share, u):
    bits = torch.tensor([allowed[0] + (allowed[-1] - allowed[0]) * share], requires_grad=True)
    sample = widths.sample_bits(bits, torch.tensor(allowed, dtype=torch.float32), u)
    soft = float(bits.detach())
    below = max(a for a in allowed if a <= soft)
    above = min(a for a in allowed if a >= soft)
    assert float(sample.detach()) in (below, above)
    sample.backward()
    assert float(bits.grad) == 1.0


@pytest.mark.parametrize("allowed", [(2, 3, 4, 5, 6, 7, 8), (4, 8), (1, 2, 16)])
@pytest.mark.parametrize("share", [0.0, 0.11, 0.5, 0.83, 1.0])
def test_sampled_bits_are_unbiased(allowed, share):
    bits = torch.tensor([allowed[0] + (allowed[-1] - allowed[0]) * share])
    among = torch.tensor(allowed, dtype=torch.float32)
    count = 2000
    draws = [(k + 0.5) / count - 0.5 for k in range(count)]
    mean = sum(float(widths.sample_bits(bits, among, u)) for u in draws) / count
    assert mean == pytest.approx(float(bits), abs=(allowed[-1] - allowed[0]) / count)


def test_nearest_bits():
    assert widths.nearest_bits(5.9, (4, 8)) == 4
    assert widths.nearest_bits(6.0, (4, 8)) == 8
    assert widths.nearest_bits(99.0, (4, 8)) == 8


def test_scale_gradient():
    x = torch.ones(3, requires_grad=True)
    y = F.scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 0.25))
