"""Models whose operations differ from one forward pass to the next."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as nnf
from quant_models import normal
from torch import nn
from torch.utils.checkpoint import checkpoint

import nipq_search as ns
from nipq_search.quant import QuantConfig, prepare, quantizers
from nipq_search.quant.insertion.prepare import quant_state

X = normal(4, 8)


def watched(model):
    """Return a dict that records the shapes and magnitudes of each quantizer's inputs."""
    seen: dict[str, list[tuple[tuple[int, ...], float]]] = {}
    for name, quantizer in quantizers(model).items():
        quantizer.observer = lambda x, name=name: seen.setdefault(name, []).append(
            (tuple(x.shape), float(x.detach().abs().max()))
        )
    return seen


def same_as_float(prepared, model, *args):
    """Compare a prepared model with bypassed quantizers to the float model.

    Returns:
        The shapes and magnitudes of each quantizer's inputs.
    """
    prepared = copy.deepcopy(prepared)
    seen = watched(prepared)
    for training in (True, False):
        torch.manual_seed(0)
        expected = model.train(training)(*args)
        torch.manual_seed(0)
        torch.testing.assert_close(prepared.train(training)(*args), expected)
    return seen


class Norm(nn.Module):
    """A residual block with a child that increments a counter in training."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return x + self.norm(self.conv(x))


def test_children_do_not_take_their_parent_s_sites():
    x = normal(2, 3, 4, 4)
    prepared = prepare(nn.Sequential(nn.Conv2d(3, 3, 1), Norm()), x, QuantConfig(residuals=True))
    prepared(x).sum().backward()
    assert int(prepared[1].norm.num_batches_tracked) == 1
    assert all(p.grad is not None for p in prepared.parameters())


class Sums(nn.Module):
    """Sums with an activation, a number or a parameter, and attention with an optional mask."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.full((8,), 100.0))

    def forward(self, x, mask=None):
        y = 1e-6 + self.a(x)
        y = y + self.b(y)
        q = y[None, None]
        return y + self.bias + nnf.scaled_dot_product_attention(q, q, q, mask)[0, 0] * 0


def test_only_residual_sums_are_quantized_as_such():
    model = Sums()
    prepared = prepare(model, X, QuantConfig(residuals=True))
    seen = same_as_float(prepared, model, X)
    assert len(seen["add"]) == 2 * 2 and max(size for _, size in seen["add"]) < 90
    same_as_float(prepared, model, X, torch.ones(4, 4, dtype=torch.bool).tril())


def test_sums_follow_the_selection():
    tensors = quant_state(
        prepare(Sums(), X, QuantConfig(residuals=True, exclude=("kind:add",)))
    ).graph.tensors
    assert tensors["add"].fixed_bits == 32
    tensors = quant_state(prepare(Sums(), X, QuantConfig(residuals=True, pin={"add": 5}))).graph
    assert tensors.tensors["add"].allowed == (5,)


class Einsums(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.w = (nn.Parameter(normal(8, 8, seed=s)) for s in range(3))

    def forward(self, x):
        y = torch.einsum("bi,ij,jk->bk", x, self.a, self.b)
        return torch.einsum("bj,jk->bk", torch.einsum("bi,ij->bj", [y, self.a]), self.w)


def test_calls_without_a_quantized_form_do_not_shift_others():
    with pytest.warns(UserWarning, match="einsum has no quantized form"):
        prepared = prepare(Einsums(), X)
    seen = watched(prepared)
    prepared(X)
    assert seen.keys() == set(quantizers(prepared)) and len(seen) == 2


class Product(nn.Module):
    """Multiplies the two tensors that it receives."""

    def forward(self, a, b):
        return a @ b


class Users(nn.Module):
    def __init__(self):
        super().__init__()
        self.product = Product()
        self.a, self.b = nn.Parameter(normal(8, 8)), nn.Parameter(100 * normal(8, 8, seed=1))

    def forward(self, x):
        x = self.product(self.product(x, self.a), self.b)
        return self.product(x, x.t())


def test_a_module_that_multiplies_by_several_weights():
    model = Users()
    prepared = prepare(model, X)
    assert {n for n, q in quantizers(prepared).items() if q.role == "weight"} == {
        "a.weight",
        "b.weight",
    }
    assert ns.profile(prepared)["weight_bytes"].sum() == 128
    eight = prepare(model, X, QuantConfig(pin={"*": 8})).eval()
    with torch.no_grad():
        assert float((eight(X) - model(X)).norm() / model(X).norm()) < 0.05
    prepared(X).sum().backward()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.u = nn.Parameter(0.1 * normal(8, 8)), nn.Parameter(10 * normal(8, 8))

    def forward(self, x):
        state = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            state = torch.tanh(x[:, t] @ self.w + state @ self.u)
        return state


def test_longer_sequences_use_each_parameter_s_own_quantizer():
    model = Recurrent()
    prepared = prepare(model, normal(4, 3, 8))
    longer = normal(4, 5, 8)
    seen = same_as_float(prepared, model, longer)
    for name, parameter in (("w", model.w), ("u", model.u)):
        sizes = [size for _, size in seen[f"{name}.weight"]]
        assert sizes == [float(parameter.detach().abs().max())] * 10


def test_a_forward_of_the_instance_is_quantized_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].forward = functools.partial(type(model[0]).forward, model[0])
    prepared = prepare(model, X)
    seen = watched(prepared)
    prepared(X)
    assert seen.keys() == set(quantizers(prepared))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.first = reentrant, nn.Linear(8, 8)
        self.weight = nn.Parameter(normal(8, 8))

    def inner(self, x):
        return nnf.linear(x, self.weight)

    def forward(self, x):
        return checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_of_methods_are_warned_of():
    prepared = prepare(Checkpointed(True), X)
    with pytest.warns(UserWarning, match="Checkpoint whole modules, or exclude"):
        prepared(X)


class Hook:
    """A forward hook that multiplies the output by a weight."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, module, args, out):
        return nnf.linear(out, self.weight)


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.weight = nn.Linear(8, 8), nn.Parameter(normal(8, 8))
        self.a.register_forward_hook(Hook(self.weight))

    def forward(self, x):
        return self.a(x)


def test_hooks_that_multiply():
    model = Hooked()
    seen = same_as_float(prepare(model, X), model, X)
    assert len(seen) == 4


class SpectralNorm(nn.Module):
    """A layer with the legacy spectral norm, whose power iteration runs in training only."""

    def __init__(self):
        super().__init__()
        self.v = torch.nn.utils.spectral_norm(nn.Linear(8, 8))
        self.q = nn.Linear(8, 8)

    def forward(self, x):
        v, q = self.v(x), self.q(x)
        return (q @ q.mT).softmax(-1) @ v


@pytest.mark.filterwarnings("ignore")
def test_products_of_training_alone_do_not_take_sites():
    x = normal(2, 5, 8)
    prepared = prepare(SpectralNorm(), x)
    seen = watched(prepared)
    prepared.train()(x)
    products = {n: [shape for shape, _ in calls] for n, calls in seen.items() if "matmul" in n}
    assert products["matmul.input"] == [(2, 5, 8), (2, 8, 5)]  # one tensor is both operands
    assert products["matmul_1.input"] == [(2, 5, 5)] and products["matmul_1.second"] == [(2, 5, 8)]


class Counted(nn.Sequential):
    """A container whose forward pass depends on its own length."""

    def forward(self, x):
        for index, layer in enumerate(self):
            x = layer(x) if index == len(self) - 1 else torch.relu(layer(x))
        return x


class Around(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def test_containers_keep_their_length():
    model = Counted(nn.Linear(8, 8), Around(nn.Linear(8, 8), nn.Linear(8, 8)))
    prepared = prepare(model, X, QuantConfig(residuals=True))
    assert len(prepared) == 2 and len(prepared[1]) == 2
    same_as_float(prepared, model, X)
    prepared(X)
    for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert quant_state(other).clock.step == 1 and len(other) == 2
        assert quant_state(other) is not quant_state(prepared)
        torch.testing.assert_close(other.eval()(X), prepared.eval()(X))
    state = prepared.state_dict()
    older = {
        key.replace("0.quant_state._extra", "quant_state._extra"): value
        for key, value in state.items()
    }
    assert older.keys() != state.keys()
    for saved in (state, older):
        other = prepare(model, X, QuantConfig(residuals=True))
        other.load_state_dict(saved)
        assert quant_state(other).clock.step == 1


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        return self.experts[1](x) + self.experts[2](x[:0]).sum()


def test_layers_that_the_example_does_not_reach_are_listed():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        prepared = prepare(Experts(), X)
    texts = [str(warning.message) for warning in found]
    assert len(texts) == 2 and texts[0].startswith("experts.0 did not run on the example inputs")
    assert texts[1].startswith("calibration did not reach experts.2.input")
    table = ns.profile(prepared).set_index("name")
    assert table["macs"]["experts.0"] == 0
    assert "did not run" in table["why"]["experts.0"]
    assert table["weight_bytes"]["experts.0"] == 64 * 4
    assert table["why"]["experts.2"] == "" and table["macs"]["experts.2"] == 0
    assert quantizers(prepared)["experts.2.input"].grid.value == "signed"


def test_padding_masks_of_torch_s_own_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = normal(2, 5, 8)
    prepared = prepare(model, {"src": x, "src_key_padding_mask": mask})
    watched(prepared)
    with torch.no_grad():
        found = prepared.eval()(x, src_key_padding_mask=mask)
        expected = model.train()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(found[~mask], expected[~mask])


def test_self_attention_that_later_looks_elsewhere():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, q, k):
            return self.attention(q, k, k)[0]

    model, q, k = Looking(), normal(2, 4, 8), normal(2, 6, 8)
    same_as_float(prepare(model, (q, q)), model, q, k)


def test_products_that_only_training_makes_draw_a_warning():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            if self.training:
                self.loss = (a @ a.t()).mean()
            return a @ b.t()

    prepared = prepare(Auxiliary(), X)
    with pytest.warns(UserWarning, match=r"the model computes 2 products .* but 1 in the traced"):
        prepared(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(X)  # the warning is issued only once


def test_parameters_that_the_model_does_not_list():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(normal(8, 8))
            self.hidden = [nn.Parameter(normal(8, 8)), nn.Linear(8, 8)]

        def forward(self, x):
            return x @ self.w + x @ self.hidden[0] + self.hidden[1](x)

    with pytest.warns(UserWarning, match="stay in float"):
        prepared = prepare(Hidden(), X)
    assert "(root)" not in str(prepared(X).sum().backward())
    assert len(quantizers(prepared)) == 2


def test_a_model_that_replaces_a_module_in_its_first_forward():
    class Product(nn.Module):
        def forward(self, a, b):
            return a @ b

    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.product, self.started = nn.Identity(), False

        def forward(self, x):
            if not self.started:
                self.product, self.started = Product(), True
            return self.product(x, x.t() * 2)

    prepared = prepare(Replacing(), X)
    layer = prepared.quant_state.graph.layers[0]
    assert layer.name.startswith("product")
    prepared(X).sum().backward()
    assert all(q.boundary.grad is not None for q in quantizers(prepared).values())
