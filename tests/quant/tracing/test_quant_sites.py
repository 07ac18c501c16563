"""Quantization of multiplications in a model's own code."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as nnf
from quant_models import normal
from torch import nn
from torch.utils.checkpoint import checkpoint

import nipq_search as ns
from nipq_search.cost import Budget, exact_costs, freeze, profile
from nipq_search.errors import UserError
from nipq_search.quant import QuantConfig, param_groups, prepare, quantizers
from nipq_search.quant.insertion.prepare import freeze_bits, quant_state


def layers(model):
    return {x.name: x for x in quant_state(model).graph.layers}


def with_quantizers_off(model):
    for quantizer in quantizers(model).values():
        quantizer.observer = lambda x: None
    return model


class Functional(nn.Module):
    """Calls `F.linear` with the weight of a layer that is never called itself."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 4)

    def forward(self, x):
        return nnf.linear(x, self.qkv.weight, self.qkv.bias)


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized in the forward pass."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return nnf.conv2d(x, weight, self.bias, padding=1)


class Transposed(nn.Module):
    """A linear layer with a weight of shape (inputs, outputs), as in some language models."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(normal(6, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 6), self.weight).view(*x.shape[:-1], 4)


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(6, 2, 4))

    def forward(self, x):
        return torch.einsum("bd,dhe->bhe", x, self.weight)


@pytest.mark.parametrize(
    ("model", "shape", "name", "kind", "scales"),
    [
        (Functional(), (3, 6), "qkv", "linear", 4),
        (Standardized(2, 5, 3), (3, 2, 6, 6), "", "conv2d", 5),
        (Transposed(), (3, 6), "", "addmm", 4),
        (Einsum(), (3, 6), "", "einsum", 1),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (3, 4, 5, 5), "", "conv_transpose2d", 6),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (3, 4, 5), "", "conv_transpose1d", 3),
        (nn.ConvTranspose3d(2, 3, 2), (3, 2, 4, 4, 4), "", "conv_transpose3d", 3),
        (nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), (3, 6), "", "linear", 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_written_out_multiplications(model, shape, name, kind, scales):
    x = normal(*shape)
    prepared = prepare(model, x)
    layer = layers(prepared)[name]
    assert layer.kind == kind and layer.weight and layer.input and not layer.float_reason
    assert quant_state(prepared).graph.tensors[layer.weight].scales == scales
    off = with_quantizers_off(copy.deepcopy(prepared))
    torch.testing.assert_close(off(x), model(x))
    prepared(x).square().sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())
    freeze(prepared, Budget(bops=exact_costs(prepared)["bops"] / 4)).eval()
    assert not torch.allclose(prepared(x), model(x))
    assert exact_costs(prepared)["bops"] == profile(prepared)["bops"].sum()


def test_standardized_weights_are_quantized_after_standardization():
    prepared = freeze_bits(prepare(Standardized(2, 5, 3), normal(3, 2, 6, 6)))
    seen = []
    quantizers(prepared)[".weight"].observer = seen.append
    prepared(normal(3, 2, 6, 6))
    torch.testing.assert_close(seen[0].mean((1, 2, 3)), torch.zeros(5), atol=1e-6, rtol=0)


class TinyLanguageModel(nn.Module):
    """A model whose embedding and output layer share a weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids, mask=None):
        x = torch.relu(self.body(self.embedding(ids)))
        return {"logits": self.head(x), "mask": mask}


IDS = torch.tensor([[1, 2, 3, 0], [4, 4, 19, 7]])


def test_tied_weights_are_one_tensor():
    prepared = prepare(TinyLanguageModel(), {"ids": IDS, "mask": IDS > 0})
    graph = quant_state(prepared).graph
    assert layers(prepared)["embedding"].weight == layers(prepared)["head"].weight
    assert [n for n, t in graph.tensors.items() if t.role == "weight"] == [
        "embedding.weight",
        "body.weight",
    ]
    assert exact_costs(prepared)["weight_bytes"] == (20 * 8 + 64) + 4 * (20 + 8 + 2) + 4 * 8
    assert profile(prepared)["weight_bytes"].tolist() == [160, 64, 0]
    hard = freeze_bits(prepared).eval()
    table = quantizers(hard)["embedding.weight"](hard.embedding.weight)
    x = hard.body(table[IDS].relu() * 0 + table[IDS])
    torch.testing.assert_close(hard(IDS)["logits"], nnf.linear(
        hard.head.input_quantizer(x.relu()), table
    ))  # fmt: skip


def test_rows_of_an_embedding_have_boundaries_of_their_own():
    prepared = prepare(TinyLanguageModel(), (IDS,))
    prepared(IDS)["logits"].sum().backward()
    quantizer = quantizers(prepared)["embedding.weight"]
    assert quantizer.boundary.shape == (20,)
    assert all(p.grad is not None for p in prepared.parameters())
    with pytest.raises(UserError, match="nothing to quantize"):
        prepare(nn.Embedding(4, 3), (IDS.clamp(max=3),))


class Loop(nn.Module):
    """A model whose forward pass may run more products than the traced one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(4, 4))

    def forward(self, x, times=2):
        for _ in range(times):
            x = torch.tanh(x @ self.weight)
        return x


def test_longer_loops_stay_quantized():
    prepared = prepare(Loop(), (normal(3, 4),))
    assert [x.weight for x in layers(prepared).values()] == [".weight", ".weight"]
    count = []
    quantizers(prepared)[".weight"].observer = lambda x: count.append(1)
    prepared(normal(3, 4), times=5)
    assert len(count) == 5


class Block(nn.Module):
    """A residual block with an in-place sum, a float layer and a product of activations."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = self.a(x)
        y += x
        z = self.b(y)
        z.add_(y)
        return torch.relu(z) @ z.t()


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = Block(), Block(), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.second(self.first(torch.relu(x)).repeat(1, 2)))


def test_residual_sums_are_quantized_on_request():
    x = normal(3, 6)
    plain = prepare(Blocks(), x)
    tensors = quant_state(plain).graph.tensors
    assert [n for n, t in tensors.items() if t.role == "addition"] == [
        "first.add",
        "first.add_1",
        "second.add",
        "second.add_1",
    ]
    assert tensors["first.add"].fixed_bits == 32
    model = Blocks()
    prepared = prepare(model, x, QuantConfig(residuals=True, pin={"first.b": "float"}))
    off = with_quantizers_off(copy.deepcopy(prepared))
    torch.testing.assert_close(off(x), model(x))
    prepared(x).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters() if p.requires_grad)
    tensors = quant_state(prepared).graph.tensors
    assert tensors["first.add"].allowed and tensors["first.add"].scales == 1
    bytes_before = exact_costs(plain)["activation_sum_bytes"]
    assert exact_costs(prepared)["activation_sum_bytes"] < bytes_before
    with pytest.raises(UserError, match="residuals: true"):
        QuantConfig(groups=("residual",))


def test_float_layers_do_not_shift_the_sites_around_them():
    prepared = prepare(Blocks(), normal(3, 6), QuantConfig(pin={"*.a": "float", "head": 8}))
    seen = []
    for name, quantizer in quantizers(prepared).items():
        quantizer.observer = lambda x, name=name: seen.append((name, tuple(x.shape)))
    prepared(normal(3, 6))
    assert ("first.matmul.input", (3, 6)) in seen and ("first.matmul.second", (6, 3)) in seen
    assert {name for name, _ in seen} == set(quantizers(prepared))


def test_prepared_models_are_copied_and_pickled_whole():
    prepared = prepare(Blocks(), normal(3, 6), QuantConfig(residuals=True)).eval()
    x = normal(3, 6, seed=5)
    for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(other(x), prepared(x))
        assert isinstance(other.first, Block)
        own = {id(m) for m in prepared.modules()}
        assert not own & {id(m) for m in other.modules()}


def test_recomputation_under_checkpointing_sees_the_same_noise():
    class Checkpointed(Blocks):
        def forward(self, x):
            x = checkpoint(self.first, torch.relu(x), use_reentrant=False)
            return self.head(checkpoint(self.second, x.repeat(1, 2), use_reentrant=False))

    source = Blocks()
    plain = prepare(source, normal(3, 6))
    other = Checkpointed()
    other.load_state_dict(source.state_dict())
    checkpointed = prepare(other, normal(3, 6))
    for model in (plain, checkpointed):
        model(normal(3, 6, seed=2)).square().sum().backward()
    grads = {n: p.grad for n, p in plain.named_parameters()}
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name])


def test_two_threads_do_not_mix():
    import threading

    prepared = freeze_bits(prepare(Blocks(), normal(3, 6))).eval()
    inputs = [normal(3, 6, seed=s) for s in range(8)]
    expected = [prepared(x) for x in inputs]
    found = [None] * len(inputs)

    def work(index):
        for _ in range(5):
            found[index] = prepared(inputs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_constants_and_scripts_stay_in_float_and_are_listed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("basis", normal(4, 4))
            self.a, self.b = nn.Parameter(normal(4, 2)), nn.Parameter(normal(2, 4))

        def forward(self, x):
            x = self.linear(x) @ self.basis
            return nnf.linear(x, self.a @ self.b)

    with pytest.warns(UserWarning, match="stay in float"):
        prepared = prepare(Odd(), normal(3, 4))
    reasons = {name: x.float_reason for name, x in layers(prepared).items()}
    assert reasons["linear"] == "" and "constant" in reasons["matmul"]
    assert "parameters only" in reasons["matmul_1"]
    low_rank = [x for x in layers(prepared).values() if x.kind == "linear"][1]
    assert low_rank.weight is not None, "the product of two parameters is a weight"
    table = profile(prepared)
    assert table["macs"].sum() == 16 + 16 + round(4 * 2 * 4 / 3) + 16


def test_layers_that_are_lazy_or_elsewhere_are_refused():
    with (
        pytest.raises(UserError, match="lazy module; run the model once"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        prepare(nn.Sequential(nn.LazyLinear(3)), normal(2, 4))
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with pytest.raises(UserError, match="weight: on the meta device"):
        prepare(model, normal(2, 3))
    with pytest.raises(UserError, match="complex64 parameters"):
        prepare(nn.Linear(3, 2, dtype=torch.complex64), normal(2, 3))
    with pytest.raises(UserError, match="complex numbers"):
        prepare(nn.Linear(3, 2), torch.zeros(2, 3, dtype=torch.complex64))


def test_optimizer_groups_hold_every_parameter_once():
    prepared = prepare(TinyLanguageModel(), (IDS,), QuantConfig(groups=("*",)))
    groups = param_groups(prepared, lr=0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in prepared.parameters())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 3), nn.Linear(5, 3), nn.BatchNorm1d(3)

    def forward(self, x, y):
        return {"logits": self.norm(self.a(x) + self.b(y))}


def test_models_of_several_inputs():
    x, y, label = normal(6, 4), normal(6, 5), torch.zeros(6)
    by_place = prepare(TwoInputs(), (x, y), calibration=[(x, y, label)])
    by_name = prepare(
        TwoInputs(), {"x": x, "y": y}, calibration=[{"x": x, "y": y, "labels": label}]
    )
    assert set(layers(by_place)) == set(layers(by_name)) == {"a", "b"}
    for model, batch in ((by_place, (x, y, label)), (by_name, {"y": y, "x": x, "labels": label})):
        ns.reestimate_norm_stats(model, [batch])
        assert model.norm.running_mean.abs().sum() > 0


def test_results_that_modules_keep_do_not_stop_the_copy():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.cache = nn.Linear(4, 4), {}

        def forward(self, x):
            self.cache["last"] = [self.linear(x)]
            return self.cache["last"][0]

    model = Keeping()
    model(normal(2, 4))
    assert prepare(model, normal(2, 4))(normal(2, 4)).requires_grad


@pytest.mark.parametrize("padding", [1, 0])
def test_padded_input_is_still_raw(padding):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            x = nnf.pad(x, (1, 1, 1, 1)) if padding else x * 2
            return self.conv(x)

    prepared = prepare(Padded(), normal(2, 1, 6, 6), QuantConfig(input_bits=8))
    assert (quant_state(prepared).graph.tensors["conv.input"].fixed_bits == 8) is bool(padding)


class Experts(nn.Module):
    """A grouped matrix product and a product with a vector."""

    def __init__(self):
        super().__init__()
        self.weight, self.vector = nn.Parameter(normal(3, 8, 16)), nn.Parameter(normal(16))

    def forward(self, x):
        ends = torch.tensor([2, 2, 5], dtype=torch.int32)
        return torch._grouped_mm(x, self.weight, offs=ends) @ self.vector


def test_work_that_torch_does_not_count_is_counted():
    prepared = prepare(Experts(), normal(5, 8))
    found = layers(prepared)
    assert {(x.kind, x.macs, x.float_reason) for x in found.values()} == {
        ("grouped_mm", 8 * 16, ""),
        ("matmul", 16, ""),
    }
    prepared(normal(5, 8)).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())


def test_layers_that_share_a_weight_are_pinned_alike():
    for pin in ({"head": "float"}, {"embedding": 8, "head": 4}):
        with pytest.raises(UserError, match="share a weight"):
            prepare(TinyLanguageModel(), (IDS,), QuantConfig(pin=pin))
    both = prepare(TinyLanguageModel(), (IDS,), QuantConfig(pin={"embedding": 6, "head": 6}))
    assert quant_state(both).graph.tensors["embedding.weight"].allowed == (6,)


def test_owners_run_under_the_compiler():
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    prepared = prepare(model, normal(2, 5, 16))
    plain = copy.deepcopy(prepared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings raised inside the compiler
        compiled = torch.compile(prepared, backend="eager")
        for _ in range(3):
            torch.testing.assert_close(compiled(normal(2, 5, 16)), plain(normal(2, 5, 16)))


def test_products_of_three_tensors_are_counted_in_float():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Bilinear(4, 5, 3)

        def forward(self, x, y):
            y = torch.einsum("ni,nj,ij->nj", x, y, self.b.weight[0])
            return self.b(self.a(x), y)

    with pytest.warns(UserWarning, match="stay in float"):
        prepared = prepare(Bilinear(), (normal(2, 4), normal(2, 5)))
    found = layers(prepared)
    assert found["b.bilinear"].macs == 4 * 5 * 3
    assert "no quantized form" in found["b.bilinear"].float_reason
    assert "no quantized form" in found["einsum"].float_reason and found["einsum"].macs > 0
