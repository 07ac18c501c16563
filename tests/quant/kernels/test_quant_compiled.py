"""Whole models under torch.compile: a single graph, with the noise and gradients of eager mode."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch._inductor.config
from quant_models import images, normal, residual_net
from torch import nn

from nipq_search.quant import QuantConfig, WeightConfig, prepare, quantizers
from nipq_search.quant.insertion.prepare import freeze_bits, quant_state
from nipq_search.quant.kernels import build
from nipq_search.quant.numerics.noise import NoiseClock


class Two(nn.Module):
    """A model with an activation that two layers consume, and a layer without a bias."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(16, 24)
        self.one, self.other = nn.Linear(24, 8), nn.Linear(24, 8, bias=False)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.one(x) * self.other(x)


MODELS = {"residual": (residual_net, images()), "two": (Two, normal(6, 16))}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings raised inside the compiler
        yield


def compare(compiled, plain, inner, x, steps=4):
    """Check that outputs, gradients and running means agree after a few steps."""
    for _ in range(steps):
        outputs = [compiled(x), plain(x)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
        for out in outputs:
            out.square().sum().backward()
    for (name, a), b in zip(inner.named_parameters(), plain.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None, name
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(quantizers(inner).values(), quantizers(plain).values(), strict=True):
        torch.testing.assert_close(a.bits.marginal, b.bits.marginal, rtol=1e-4, atol=1e-9)
    assert quant_state(inner).clock.step == quant_state(plain).clock.step == steps


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("residual", "uniform"),
        ("residual", "lsq"),
        ("two", "uniform"),
        ("two", "empirical"),
        ("two", "pinned"),
    ],
)
def test_training_is_one_graph(name, kind):
    build_model, x = MODELS[name]
    config = {
        "uniform": QuantConfig(),
        "empirical": QuantConfig(proxy="empirical"),
        "pinned": QuantConfig(weights=WeightConfig(bits=(4,))),
        "lsq": QuantConfig(quantizer="lsq"),
    }[kind]
    model = prepare(build_model(), x, config).train()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compare(compiled, plain, model, x)
    for each in (model, plain):
        freeze_bits(each)
    torch.testing.assert_close(compiled(x), plain(x))
    compiled.eval(), plain.eval()
    torch.testing.assert_close(compiled(x), plain(x))


def test_one_graph_serves_every_step():
    model = prepare(residual_net(), images()).train()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(12):
        compiled(images()).sum().backward()
    # One more compilation for the first step with existing gradients.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2


@pytest.mark.parametrize("frozen", [False, True])
def test_batches_of_any_size_are_one_graph(frozen):
    model = prepare(Two(), normal(6, 16)).train()
    if frozen:
        freeze_bits(model).eval()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (3, 5, 9):
        x = normal(16, size).t()
        torch.testing.assert_close(compiled(x), plain(x))


def test_several_forwards_and_several_backwards():
    model = prepare(Two(), normal(6, 16)).train()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for forward in (compiled, plain):
        loss = (forward(normal(6, 16)) * forward(normal(6, 16, seed=3))).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


class Halves(nn.Module):
    """A model whose layers consume slices of channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        first, second = self.a(x).chunk(2, 1)
        return self.b(first) + self.b(second)


@pytest.mark.parametrize("kind", ["bfloat16", "float64", "slices"])
def test_inductor_takes_what_the_operations_promise(kind):
    model, x = prepare(Two(), normal(6, 16)).train(), normal(6, 16)
    if kind == "slices":
        x = normal(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        model = prepare(Halves(), x).train().to(memory_format=torch.channels_last)
    else:
        dtype = getattr(torch, kind)
        model, x = model.to(dtype), x.to(dtype)
    plain = copy.deepcopy(model)
    # With more threads, Inductor starts compiler processes, each of which imports torch.
    with torch._inductor.config.patch(compile_threads=1):
        outputs = [torch.compile(model, fullgraph=True)(x), plain(x)]
    tolerance = 0.05 if kind == "bfloat16" else 1e-5
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    for out in outputs:
        out.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in (*model.parameters(),)) and any(
        p.grad is not None for p in model.parameters()
    )


def test_a_width_that_does_not_learn_measures_nothing():
    model = prepare(Two(), normal(6, 16), QuantConfig(seed=2**63 + 5)).train()
    for quantizer in quantizers(model).values():
        quantizer.bits.theta.requires_grad_(False)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compare(compiled, plain, model, normal(6, 16), steps=2)
    assert all(float(q.bits.marginal) == 0.0 for q in quantizers(model).values())


def test_without_kernels(monkeypatch):
    monkeypatch.setenv(build.SWITCH, "eager")
    build.library.cache_clear()
    try:
        for proxy in ("uniform", "empirical"):
            model = prepare(Two(), normal(6, 16), QuantConfig(proxy=proxy)).train()
            plain = copy.deepcopy(model)
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            compare(compiled, plain, model, normal(6, 16))
    finally:
        monkeypatch.undo()
        build.library.cache_clear()


def test_autocast_to_bfloat16():
    model = prepare(Two(), normal(6, 16)).train()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [compiled(normal(6, 16)), plain(normal(6, 16))]
    assert torch.equal(*outputs) and outputs[0].dtype is torch.bfloat16


def test_copies_of_a_clock_count_alone():
    clock = NoiseClock(7, 5)
    for other in (copy.deepcopy(clock), pickle.loads(pickle.dumps(clock))):
        assert (other.seed, other.step, int(other.count)) == (7, 5, 5)
        other.count.add_(1)
        assert (other.step, clock.step) == (6, 5)
        other.step = 9
        assert int(other.count) == 9
    assert int(clock.count) == 5
