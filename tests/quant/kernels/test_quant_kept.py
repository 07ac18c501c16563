"""Tensors that a training step saves for the backward pass, and those that it recomputes."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as nnf
from quant_models import normal
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from nipq_search.quant import QuantConfig, prepare, quantizers
from nipq_search.quant.kernels import cpu, function, kept
from nipq_search.quant.kernels.build import SWITCH, library

X = normal(6, 10, 16)


@pytest.fixture(autouse=True)
def no_tensor_is_small(monkeypatch):
    """Disable the size limit below which tensors are never recomputed."""
    monkeypatch.setattr(function, "SMALL_ELEMENTS", 0)


class Attention(nn.Module):
    """Self-attention that calls torch's fused function."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, mask=None):
        heads = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        mixed = nnf.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(-2))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def convolutions():
    return nn.Sequential(
        nn.Conv1d(10, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3), nn.ReLU()
    )


MODELS = {"attention": Attention, "encoder": encoder, "convolutions": convolutions}


def trained(model, x=X, context=None, steps=1):
    """Return the output and all gradients after `steps` steps."""
    model.train()
    for _ in range(steps):
        model.zero_grad()
        out = model(x)
    with context or torch.enable_grad():
        out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def everything_kept(monkeypatch):
    """Disable recomputation, so that products save their operands."""
    monkeypatch.setattr(function, "register_recipe", lambda y, x, compute: None)


@pytest.mark.parametrize("phase", ["noise", "empirical", "tuning", "lsq"])
@pytest.mark.parametrize("name", MODELS)
def test_recomputed_tensors_equal_the_originals(monkeypatch, name, phase):
    torch.manual_seed(0)
    config = QuantConfig(
        quantizer="lsq" if phase == "lsq" else "nipq",
        proxy="empirical" if phase == "empirical" else "uniform",
    )
    model = prepare(MODELS[name](), X, config)
    if phase == "tuning":
        for quantizer in quantizers(model).values():
            quantizer.freeze(4)
    again = trained(copy.deepcopy(model))
    everything_kept(monkeypatch)
    at_once = trained(model)
    assert len(again) == len(at_once) > 3
    assert all(torch.equal(a, b) for a, b in zip(again, at_once, strict=True))


def held_after(model, x):
    """Return the number of bytes that a forward pass leaves allocated while its output exists."""
    model.train()(x)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = model(x)
    held = sum(event.self_cpu_memory_usage for event in record.key_averages())
    out.sum().backward()
    return held


@pytest.mark.parametrize("quantizer", ["nipq", "lsq"])
def test_a_layer_keeps_one_tensor_and_weights_are_not_kept_twice(quantizer):
    config = QuantConfig(quantizer=quantizer)
    x = torch.rand(16, 8, 24, 24)
    layers = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*(copy.deepcopy(layer) for _ in range(6) for layer in layers))
    prepared = prepare(copy.deepcopy(net), x, config)
    # A ReLU saves one byte per element, a quarter of the size of a float32 tensor.
    assert held_after(prepared, x) < 1.2 * held_after(net, x)
    wide = nn.Sequential(*(nn.Linear(512, 512) for _ in range(6)))
    tokens = torch.randn(64, 512)
    prepared = prepare(copy.deepcopy(wide), tokens, config)
    assert held_after(prepared, tokens) < 1.5 * held_after(wide, tokens)


def test_attention_keeps_its_probabilities_once():
    config = QuantConfig()
    x = torch.randn(4, 128, 16)
    model = prepare(Attention(), x, config)
    one = 4 * 4 * 128 * 128 * 4
    everything = held_after(model, x)
    assert one < everything < 2 * one
    mask = torch.ones(4, 1, 128, 128, dtype=torch.bool).tril()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = model(x, mask)
    held = sum(event.self_cpu_memory_usage for event in record.key_averages())
    assert out.requires_grad and one < held < 2.3 * one


class Shared(nn.Module):
    """Two layers that consume the same tensor, like a residual block and its shortcut."""

    def __init__(self, overwrites=False):
        super().__init__()
        self.stem, self.one, self.other = (nn.Linear(16, 16) for _ in range(3))
        self.overwrites = overwrites

    def forward(self, x):
        x = self.stem(x)
        first = self.one(x)
        if self.overwrites and self.training:
            x.add_(0.0)  # changes the version counter, not the values
        return first + self.other(x)


@pytest.fixture
def made(monkeypatch):
    """Return a list that records the shape of each tensor that the kernels quantize."""
    shapes = []

    def spied(x, *rest, original=cpu.forward):
        shapes.append(tuple(x.shape))
        return original(x, *rest)

    monkeypatch.setattr(cpu, "forward", spied)
    return shapes


@pytest.mark.parametrize("proxy", ["uniform", "empirical"])
def test_an_activation_of_two_consumers_is_quantized_once(monkeypatch, made, proxy):
    model = prepare(Shared(), X, QuantConfig(proxy=proxy)).train()
    assert model.one.input_quantizer is model.other.input_quantizer
    again = copy.deepcopy(model)
    made.clear()
    once = trained(model)
    marginal = quantizers(model)["one.input"].bits.marginal.clone()
    # Twice the stem's input, which is recomputed in the backward pass, and once the shared input.
    assert made.count(tuple(X.shape)) == 3
    model(X)
    assert made.count(tuple(X.shape)) == 5  # the next step draws new noise
    monkeypatch.setattr(function._Quantization, "reused_output", lambda self, x: None)
    for a, b in zip(once, trained(again), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(marginal, quantizers(again)["one.input"].bits.marginal) and marginal != 0


def test_an_activation_that_was_overwritten_is_quantized_anew(made):
    model = prepare(Shared(overwrites=True), X).train()
    made.clear()
    model(X)
    assert made.count(tuple(X.shape)) == 3


def test_consumers_of_one_activation_have_backwards_of_their_own():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x):
            x = x + 1  # saves nothing for the backward pass
            return self.one(x), self.other(x)

    model = prepare(Heads(), X).train()
    inputs = X.clone().requires_grad_()
    for out in model(inputs):
        out.square().sum().backward()
    assert inputs.grad.isfinite().all() and model.other.weight.grad.abs().sum() > 0


def test_masks_that_a_hook_applies_in_place():
    """A tensor that a hook has overwritten must not be recomputed without the hook."""
    model = prepare(Shared(), X).train()
    mask = (torch.arange(16) % 2).float()
    other = copy.deepcopy(model)
    for name in ("one", "other"):
        for m, hook in (
            (model, lambda q, args, out: out.mul_(mask)),
            (other, lambda q, args, out: out * mask),
        ):
            getattr(m, name).weight_quantizer.register_forward_hook(hook)
    x, y = (X.clone().requires_grad_() for _ in range(2))
    model(x).square().sum().backward()
    other(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_models_that_keep_activations_can_be_saved(tmp_path):
    class Keeps(Shared):
        def forward(self, x):
            self.features = self.stem(x)
            return self.one(self.features) + self.other(self.features)

    model = prepare(Keeps(), X).train()
    out = model(X)
    assert vars(model.features).keys() <= {"_backward_hooks"}
    torch.save(model.features, tmp_path / "features.pt")
    out.sum().backward()


@pytest.mark.parametrize("quantizer", ["nipq", "lsq"])
def test_what_is_computed_again_is_not_computed_from_other_values(quantizer):
    """Detect in-place changes even if the backward pass does not reach the quantizer's node."""
    config = QuantConfig(quantizer=quantizer)
    x = X.clone().requires_grad_()
    model = prepare(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), X, config).train()
    out = model(x).sum()
    with torch.no_grad():
        model[1].weight.mul_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation.*quantized product"):
        torch.autograd.grad(out, x)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    out = model(x).sum()
    model[0].weight.mul_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation.*quantized product"):
        out.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_default_types_change_nothing(dtype):
    for config in (QuantConfig(), QuantConfig(quantizer="lsq"), QuantConfig(proxy="empirical")):
        model = prepare(encoder(), X, config)
        expected = trained(copy.deepcopy(model))
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            found = trained(model)
        finally:
            torch.set_default_dtype(before)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_another_default_device_changes_nothing():
    model = prepare(convolutions(), X)
    expected = trained(copy.deepcopy(model))
    with torch.device("meta"):
        found = trained(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_width_that_does_not_learn_measures_nothing():
    model = prepare(convolutions(), X)
    for quantizer in quantizers(model).values():
        quantizer.bits.theta.requires_grad_(False)
    trained(model)
    assert all(float(q.bits.marginal) == 0.0 for q in quantizers(model).values())


def test_a_graph_can_be_gone_through_twice_and_in_evaluation_mode():
    model = prepare(encoder(), X).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = model(X).square().sum()
    first = torch.autograd.grad(out, parameters, retain_graph=True, allow_unused=True)
    model.eval()
    second = torch.autograd.grad(out, parameters, allow_unused=True)
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


class Checkpointed(nn.Module):
    """A checkpointed model, which saves no tensors of its inner layers."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.inner = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 32), nn.GELU())
        self.last, self.reentrant = nn.Linear(32, 8), reentrant

    def forward(self, x):
        x = self.first(x)
        if self.reentrant is None or not self.training:
            x = self.inner(x)
        else:
            x = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.last(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_give_the_same_gradients(reentrant):
    model = prepare(Checkpointed(reentrant), X)
    same = copy.deepcopy(model)
    same.reentrant = None
    for a, b in zip(trained(model), trained(same), strict=True):
        assert torch.equal(a, b)


def test_other_hooks_on_saved_tensors_come_first():
    model = prepare(convolutions(), X).train()
    plain = trained(copy.deepcopy(model))
    with torch.autograd.graph.save_on_cpu():
        offloaded = trained(copy.deepcopy(model))
    assert all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True))
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        without = trained(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, without, strict=True))


def test_overwritten_weights_and_operands_are_noticed():
    model = prepare(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), X).train()
    out = model(X).sum()
    with torch.no_grad():
        model[1].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_overwritten_raw_input_is_noticed():
    model = prepare(nn.Sequential(nn.Linear(16, 4)), X, QuantConfig(input_bits=8)).train()
    assert model[0].input_quantizer is None
    x = X.clone()
    out = model(x).sum()
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_nothing_lives_longer_than_its_graph():
    def packed():
        return sum(type(each) is kept._Recomputed for each in gc.get_objects())

    model = prepare(encoder(), X).train()
    gc.collect()
    gc.disable()  # so that reference cycles are not collected
    try:
        assert packed() == 0
        out = model(X)
        assert packed() > 10
        del out
        assert packed() == 0
    finally:
        gc.enable()


def test_torch_operations_train_as_before(monkeypatch):
    model = prepare(convolutions(), X)
    fast = trained(copy.deepcopy(model))
    monkeypatch.setenv(SWITCH, "eager")
    library.cache_clear()
    try:
        eager = trained(model)
    finally:
        monkeypatch.undo()
        library.cache_clear()
    for a, b in zip(fast, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
