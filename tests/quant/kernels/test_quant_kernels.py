"""Agreement of the C kernels with the torch operations, and the conditions for their use."""

from __future__ import annotations

import pytest
import torch
from quant_models import distance, images, normal, residual_cdf, residual_net
from torch import nn

from nipq_search.quant import QuantConfig, prepare, quantizers
from nipq_search.quant import kernels as K
from nipq_search.quant.kernels import build
from nipq_search.quant.numerics import functional as F
from nipq_search.quant.numerics import widths
from nipq_search.quant.numerics.functional import Boundary, Grid
from nipq_search.quant.numerics.noise import (
    GROUP,
    _stride,
    drawn_from,
    inner_size,
    mix,
    residuals_of,
    uniform_noise,
)

CPU = torch.device("cpu")
CHANNELS_LAST = torch.channels_last

# Shape, axis of the boundaries (None: one boundary), memory format. The sizes cover remainders of
# a vector, runs shorter than a vector, interleaved channels, and more than one piece per thread.
LAYOUTS = [
    ((7,), None, None),
    ((70_001,), None, None),
    ((3, 5, 9, 11), None, CHANNELS_LAST),
    ((4, 6, 20, 16), None, "heads"),
    ((20, 3, 3, 3), 0, None),
    ((20, 3, 3, 3), 0, CHANNELS_LAST),
    ((8, 20, 3, 3), 1, None),
    ((40, 33), 1, None),
    ((33, 3000), 0, None),
    ((1, 16), 1, None),
    ((4097, 40), 1, None),
]


def boundary_of(alpha, bits, grid=Grid.SIGNED, axis=0):
    return Boundary(alpha, torch.as_tensor([float(bits)]), grid, torch.tensor([-0.6]), axis)


ONE = boundary_of(torch.tensor([1.7]), 3)


def case(shape, axis, memory, grid, bits, seed=0):
    """Return the leaves `[x, alpha, bits]`, all of which require gradients, and the boundary."""
    x = normal(*shape, seed=seed)
    if memory is CHANNELS_LAST:
        x = x.contiguous(memory_format=CHANNELS_LAST)
    elif memory == "heads":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if grid is Grid.UNSIGNED:
        x = x.abs()
    alpha = torch.ones(1) if axis is None else torch.linspace(0.9, 2.5, shape[axis])
    boundary = boundary_of(alpha, bits, grid, axis or 0)
    return [t.requires_grad_() for t in (x, alpha, boundary.bits)], boundary


def eager(x, boundary, key, empirical):
    """Run the same computation with torch operations instead of kernels."""
    range_ = boundary.range(x.dim())
    if empirical:
        drawn = drawn_from(residuals_of(x, *range_[:3], boundary.axis), x.shape, key)
    else:
        drawn = uniform_noise(x.shape, key, CPU, x.dtype)
    return F.pseudo_quantize(x, range_, drawn.as_strided(x.shape, x.stride()))


def hard(x, boundary):
    return F.hard_quantize(x, boundary.range(x.dim()))


def results(quantize, *arguments, leaf=True, device="cpu"):
    """Return output and gradients for an output gradient that varies between elements."""
    leaves, boundary = case(*arguments)
    if device != "cpu":
        leaves = [t.detach().to(device).requires_grad_() for t in leaves]
        minimum = boundary.minimum.to(device)
        boundary = Boundary(leaves[1], leaves[2], boundary.grid, minimum, boundary.axis)
    y = quantize(leaves[0] if leaf else leaves[0] * 1.0, boundary)
    grads = torch.autograd.grad(y, leaves, normal(*y.shape, seed=9).to(device))
    return [t.cpu() for t in (y, *grads)]


@pytest.mark.parametrize("grid", list(Grid))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("law", ["uniform", "empirical", "rounding"])
def test_kernels_agree_with_torch_operations(law, layout, grid):
    key, empirical = mix(7, 1), law == "empirical"
    for bits in (2, 4.6 if law != "rounding" else 5, 14):
        arguments = (*layout, grid, bits)
        if law == "rounding":
            fast, plain = (results(f, *arguments) for f in (K.hard_quantize, hard))
            assert torch.equal(fast[0], plain[0])
        else:
            fast = results(lambda x, r: K.pseudo_quantize(x, r, key, empirical), *arguments)
            plain = results(lambda x, r: eager(x, r, key, empirical), *arguments)
        assert type(fast[0].grad_fn).__name__ == "_QuantizeBackward"
        assert fast[0].stride() == plain[0].stride()
        for a, b in zip(fast, plain, strict=True):
            # Torch's float32 sums over many elements are less accurate than those of the kernels.
            torch.testing.assert_close(a, b, rtol=2e-5, atol=max(2e-5, 2e-9 * fast[0].numel()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("law", ["uniform", "empirical"])
def test_saving_the_input_or_the_output_changes_no_result(layout, law):
    """The backward pass uses the input if it is retained anyway, otherwise the output."""
    for grid in Grid:
        kept = [
            results(
                lambda x, b: K.pseudo_quantize(x, b, mix(3), law == "empirical"),
                *(*layout, grid, 4),
                leaf=leaf,
            )
            for leaf in (True, False)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("law", ["uniform", "empirical", "rounding"])
def test_lower_precision_is_computed_in_float32(dtype, law):
    key, empirical = mix(7, 1), law == "empirical"

    def fast(x, b):
        if law == "rounding":
            return K.hard_quantize(x.to(dtype), b)
        return K.pseudo_quantize(x.to(dtype), b, key, empirical)

    def plain(x, b):
        wide = x.to(dtype).float()
        return (hard(wide, b) if law == "rounding" else eager(wide, b, key, empirical)).to(dtype)

    for layout in (((70_001,), None, None), ((8, 20, 3, 3), 1, None)):
        ours, expected = (results(f, *layout, Grid.SIGNED, 12) for f in (fast, plain))
        assert ours[0].dtype is dtype and ours[1].dtype is torch.float32
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_sums_do_not_depend_on_the_number_of_threads():
    def run():
        return [
            results(lambda x, r: K.pseudo_quantize(x, r, 5, False), *layout, Grid.SIGNED, 3)
            for layout in LAYOUTS
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(3)
        together = run()
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_noise_of_the_kernels_follows_its_law():
    x = normal(200_000)
    range_ = ONE.range(1)
    inside = (x > range_.low) & (x < range_.high)
    for empirical, cdf in ((False, lambda t: t + 0.5), (True, residual_cdf(range_))):
        y = K.pseudo_quantize(x, ONE, mix(3), empirical)
        drawn = ((y - x) / range_.step)[inside][:100_000]
        assert distance(drawn, cdf) < 0.01


def test_nan_propagates_and_infinity_is_clipped():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.3])
    one = boundary_of(torch.ones(1), 4)
    for quantize in (K.hard_quantize, lambda x, r: K.pseudo_quantize(x, r, 1)):
        y = quantize(x, one)
        assert y[0].isnan() and y[1] == 1 and y[2] == -1 and y[3].isfinite()


def test_where_the_kernels_are_not_used():
    x = normal(6, 4)
    assert K.backend_for(x, ONE) and K.backend_for(nn.Parameter(x), ONE)
    assert not K.backend_for(x.double(), ONE)
    assert not K.backend_for(x[:0], ONE)
    assert K.hard_quantize(x[:0], ONE).shape == (0, 4)
    every_second = normal(6, 8)[:, ::2]
    assert torch.equal(K.hard_quantize(every_second, ONE), hard(every_second, ONE))


@pytest.mark.parametrize("grid", list(Grid))
def test_gradients_of_a_range_are_those_of_its_formula(grid):
    alpha = torch.linspace(0.5, 2.0, 5, dtype=torch.float64, requires_grad=True)
    for bits in (2.0, 3.4, 8.0, 14.0):
        width = torch.tensor([bits], dtype=torch.float64, requires_grad=True)
        range_ = F.quantization_range(alpha, width, grid, torch.tensor([-0.3]).double())
        grads = [normal(5, seed=k).double() for k in range(3)]
        total = sum((t * g).sum() for t, g in zip(range_[:3], grads, strict=True))
        exact = torch.autograd.grad(total, (alpha, width))
        detached = F.Range(*(t.detach() for t in range_))
        found = F.range_gradients(detached, grid, *grads)
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grid", list(Grid))
def test_what_is_learned_goes_into_one_node(grid):
    """Computing softplus and the sampled width in the kernel's node changes no result."""
    found = []
    for together in (True, False):
        x = normal(20, 30).requires_grad_()
        raw = torch.linspace(-25.0, 25.0, 20).requires_grad_()
        theta, marginal = torch.tensor([0.3], requires_grad=True), torch.zeros(1)
        start = torch.linspace(0.5, 2.0, 20)
        draw = widths.Draw(theta, 3, 0.7, marginal)
        boundary = Boundary(raw, theta, grid, torch.tensor([-0.4]), 0, start, draw)
        if not together:
            boundary = boundary.resolved()
        y = K.pseudo_quantize(x, boundary, mix(4))
        y.backward(normal(20, 30, seed=2))
        assert (
            y.grad_fn.next_functions[1][0]
            .name()
            .startswith("torch::autograd::AccumulateGrad" if together else "_Positive")
        )
        found.append([y.detach(), x.grad, raw.grad, theta.grad, marginal])
    for a, b in zip(*found, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def test_a_boundary_does_not_reach_zero():
    raw = torch.tensor([-200.0], requires_grad=True)
    for start in (torch.ones(1), torch.full((1,), float("nan"))):
        theta = torch.zeros(1, requires_grad=True)
        draw = widths.Draw(theta, 3, 0.7, torch.zeros(1))
        boundary = Boundary(raw, theta, Grid.SIGNED, torch.zeros(1), 0, start, draw)
        y = [K.pseudo_quantize(normal(9), b, 1) for b in (boundary, boundary.resolved())]
        torch.testing.assert_close(*y, equal_nan=True)
        assert float(y[0].detach().abs().max()) <= F.MIN_BOUNDARY or y[0].isnan().any()


def test_a_width_is_sampled_alike_as_a_number_and_as_a_tensor():
    for allowed in ((2, 3, 4, 8), (4, 8), (1, 16)):
        for share in range(41):
            bits = allowed[0] + (allowed[-1] - allowed[0]) * share / 40
            for u in (-0.49, -0.2, 0.0, 0.13, 0.49):
                tensor = widths.sample_bits(
                    torch.tensor([bits], dtype=torch.float64), torch.tensor(allowed).double(), u
                )
                assert widths.sample_width(bits, allowed, u) == int(tensor)


def test_what_watches_single_operations_sees_them():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    model(images())
    model = prepare(model, images())
    for quantizer in quantizers(model).values():
        quantizer.freeze()
    model.eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(images()).shape == (len(images()), 3)
    recorded = make_fx(lambda x: model(x))(images())
    assert torch.equal(recorded(images()), model(images()))


def test_training_forwards_can_be_faked():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = prepare(residual_net(), images())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(images()).shape == residual_net()(images()).shape


def test_boundaries_that_do_not_fit_are_refused():
    many = boundary_of(torch.ones(16), 4, axis=1)
    with pytest.raises(RuntimeError, match=r"16 boundaries do not fit dimension 1 of \(10, 20\)"):
        K.hard_quantize(normal(10, 20), many)
    elsewhere = boundary_of(torch.ones(1, device="meta"), 4)
    with pytest.raises(RuntimeError, match="meta"):
        K.hard_quantize(normal(10, 20), elsewhere)


def test_empirical_noise_of_neighbours_is_independent():
    """Adjacent elements of a smooth signal have similar residuals, so the table is shuffled."""
    for count in (100_000, 700_000):
        x = torch.sin(torch.linspace(0, 300, count))
        drawn = (K.pseudo_quantize(x, ONE, 5, True) - x)[10:-10]
        lag = torch.stack([drawn[:-1], drawn[1:]])
        assert abs(float(torch.corrcoef(lag)[0, 1])) < 0.02
    # A stride that shares a factor with the size would skip some channels.
    x = normal(32, 96, 12, 12).contiguous(memory_format=CHANNELS_LAST)
    seen = torch.arange(0, x.numel(), _stride(x.numel())) % 96
    assert len(seen.unique()) == 96


def test_sizes_that_c_and_python_share():
    text = build.SOURCES[0].read_text()
    assert f"#define PIECE {K.cpu._PIECE} " in text
    assert f"#define LANES {GROUP}\n" in text


def test_export_with_a_batch_of_any_size():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    for quantizer in ("nipq", "lsq"):
        made = prepare(model, images(), QuantConfig(quantizer=quantizer))
        for each in quantizers(made).values():
            each.freeze()
        dynamic = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(made.eval(), (images(),), dynamic_shapes=dynamic)
        torch.testing.assert_close(exported.module()(images()[:1]), made(images()[:1]))


def test_saved_tensors_that_come_back_in_another_layout():
    x = normal(2, 3, 4, 5).contiguous(memory_format=CHANNELS_LAST)
    grad = normal(2, 3, 4, 5, seed=1)
    for quantize in (K.hard_quantize, lambda x, b: K.pseudo_quantize(x, b, 123)):
        found = []
        for unpack in (lambda t: t, lambda t: t.contiguous()):
            leaf = x.clone().requires_grad_()
            alpha = torch.tensor([1.1], requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
                y = quantize(leaf * 1.0, boundary_of(alpha, 4))
            found.append(torch.autograd.grad(y, (leaf, alpha), grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_that_are_not_plain_memory():
    alpha = torch.tensor([1.1], requires_grad=True)
    x = normal(8).requires_grad_()
    for quantize in (K.hard_quantize, lambda x, b: K.pseudo_quantize(x, b, 1)):
        y = quantize(x, boundary_of(alpha, 4))
        zero = torch.autograd.grad(
            y, (x, alpha), torch._efficientzerotensor((8,)), retain_graph=True
        )
        assert not any(t.any() for t in zero)
        plus, minus = (
            torch.autograd.grad(y, (x, alpha), g, retain_graph=True)
            for g in (torch.ones(8), torch._neg_view(torch.ones(8)))
        )
        assert all(torch.equal(a, -b) for a, b in zip(plus, minus, strict=True))
        with pytest.raises(RuntimeError, match="NIPQ_SEARCH_KERNELS=eager"):
            torch.autograd.grad(y, (x, alpha), torch.eye(8), is_grads_batched=True)
    negative = torch._neg_view(normal(8))
    assert torch.equal(K.hard_quantize(negative, ONE), K.hard_quantize(-normal(8), ONE))


def test_infinite_values_leave_gradients_finite():
    for quantize in (K.hard_quantize, hard):
        alpha = torch.tensor([1.0], requires_grad=True)
        x = torch.tensor([0.1, float("inf"), -1e38 * 10], requires_grad=True)
        quantize(x, boundary_of(alpha, 4)).sum().backward()
        assert alpha.grad.isfinite().all() and x.grad.isfinite().all()


def test_boundaries_of_a_dense_tensor_are_found_by_its_strides():
    x = normal(2, 3, 4, 5).contiguous(memory_format=CHANNELS_LAST)
    for axis in (0, 1, 2, 3, -1):
        shape = [1] * 4
        shape[axis] = x.shape[axis]
        number = torch.arange(x.shape[axis]).view(shape).expand_as(x)
        flat = number.contiguous(memory_format=CHANNELS_LAST).as_strided((x.numel(),), (1,))
        inner = inner_size(x, x.shape[axis], axis)
        assert torch.equal((torch.arange(x.numel()) // inner) % x.shape[axis], flat)


@pytest.mark.parametrize("quantizer", ["nipq", "lsq"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, CHANNELS_LAST])
def test_a_model_trains_by_the_kernels(monkeypatch, quantizer, memory):
    """Fail if the fast path is silently bypassed."""
    config = QuantConfig(quantizer=quantizer)
    model = prepare(residual_net(), images(), config).to(memory_format=memory)

    def forbidden(*args):
        raise AssertionError("torch operations were used")

    monkeypatch.setattr(F, "pseudo_quantize", forbidden)
    monkeypatch.setattr(F, "hard_quantize", forbidden)
    model(images()).sum().backward()
    model.eval()(images())
