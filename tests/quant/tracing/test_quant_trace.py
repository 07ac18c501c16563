"""The graph of a prepared model: layers, MACs, shared tensors, residual sums."""

from __future__ import annotations

import warnings

import pytest
import torch
from quant_models import images, normal, residual_net
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nipq_search.errors import UserError
from nipq_search.quant import QuantConfig, prepare
from nipq_search.quant import quantizers as find_quantizers
from nipq_search.quant.insertion.pins import LayerName, matching, pins_of
from nipq_search.quant.insertion.prepare import quant_state


def macs_by_torch(model, x):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops() // 2 // len(x)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (8, 9, 7)),
        (nn.Conv2d(8, 12, (3, 5), groups=4, stride=2), (8, 11, 13)),
        (nn.Conv2d(4, 6, (1, 7), dilation=2, padding="same"), (4, 9, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 5, 5)),
        (nn.Conv1d(4, 6, 5, groups=2), (4, 20)),
        (nn.Conv3d(2, 4, (1, 2, 3)), (2, 4, 5, 6)),
        (nn.Linear(7, 3), (7,)),
        (nn.Linear(7, 3), (5, 7)),
    ],
    ids=str,
)
def test_macs_agree_with_torch(layer, shape):
    x = normal(3, *shape)
    graph = quant_state(prepare(layer, x)).graph
    assert [info.macs for info in graph.layers] == [macs_by_torch(layer, x)]
    assert graph.layers[0].name == ""


def test_macs_of_a_whole_net():
    model = residual_net()
    graph = quant_state(prepare(model, images())).graph
    assert sum(info.macs for info in graph.layers) == macs_by_torch(model, images())
    assert [info.name for info in graph.layers] == ["stem", "main", "side", "head"]
    assert [info.kind for info in graph.layers] == ["conv2d", "conv2d", "conv2d", "linear"]
    assert graph.tensors["main.input"].numel == 4 * 64
    assert graph.tensors["add"].numel == 6 * 16
    plain = 8 + 6 + 6 + 3  # normalization and biases
    assert graph.float_parameters == plain


def test_branches_share_one_quantizer():
    model = prepare(residual_net(), images())
    assert model.main.input_quantizer is model.side.input_quantizer
    assert "side.input" not in find_quantizers(model)
    assert [info.input for info in quant_state(model).graph.layers][1:3] == ["main.input"] * 2


class Twins(nn.Module):
    """Two layers that consume the same tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x) * self.b(x)


def tensors(pin, **options):
    model = prepare(Twins(), normal(2, 4), QuantConfig(pin=pin, **options))
    graph = quant_state(model).graph
    return model, graph.tensors, {info.name: info.input for info in graph.layers}


def test_pins():
    ordered = QuantConfig(pin={"block1.*": "float", "*": 3})
    names = [LayerName(name, "conv2d", True) for name in ("block1.conv", "block10.conv")]
    assert [pin.bits for pin in pins_of(names, ordered)] == ["float", 3]
    assert matching("a?", [LayerName("a", "linear", True)]) == set()
    model, found, _ = tensors({"a": 6})
    assert found["a.weight"].allowed == (6,) and len(found["b.weight"].allowed) == 7
    assert found["a.input"].allowed == (6,)
    assert model.b.input_quantizer is model.a.input_quantizer
    _, found, _ = tensors({"[ab]": 5})
    assert found["a.weight"].allowed == found["b.weight"].allowed == (5,)
    _, found, _ = tensors({"a": 3, "*": 3})
    assert found["b.weight"].allowed == (3,)


def test_float_pins():
    model, found, inputs = tensors({"a": "float"})
    assert type(model.a) is nn.Linear
    assert found["a.weight"].fixed_bits == found["a.input"].fixed_bits == 32
    assert inputs == {"a": "a.input", "b": "b.input"} and found["b.input"].allowed
    _, found, inputs = tensors({"*": "float"})
    assert inputs == {"a": "a.input", "b": "a.input"}, "one float tensor, counted once"


def test_raw_input_counts_once():
    model, found, inputs = tensors({}, input_bits=8)
    assert model.a.input_quantizer is None and model.b.input_quantizer is None
    assert inputs == {"a": "a.input", "b": "a.input"}
    assert [n for n, t in found.items() if t.role == "activation"] == ["a.input"]
    assert found["a.input"].fixed_bits == 8
    _, found, _ = tensors({"a": "float"}, input_bits=8)
    assert found["a.input"].fixed_bits == 8


def test_bad_pins_are_named():
    with pytest.raises(UserError, match="quant.pin.haed: no layer.*did you mean 'head'"):
        prepare(residual_net(), images(), QuantConfig(pin={"haed": 8}))
    with pytest.raises(UserError, match="a, b consume the same tensor"):
        tensors({"a": 4, "b": 8})


def rows(model):
    """Return the name, kind, MACs and operands of each layer of a prepared model."""
    graph = quant_state(model).graph
    return [(x.name, x.kind, x.macs, x.weight, x.input, x.second) for x in graph.layers]


def test_products_of_activations_are_layers():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return torch.softmax(q @ k.transpose(1, 2), -1) @ v

    model = prepare(Attention(), normal(2, 5, 8))
    work = 5 * 5 * 8
    assert rows(model)[1:] == [
        ("matmul", "matmul", work, None, "matmul.input", "matmul.second"),
        ("matmul_1", "matmul", work, None, "matmul_1.input", "matmul_1.second"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # float layers on request cause no warning
        model = prepare(Attention(), normal(2, 5, 8), QuantConfig(products=False))
    last = quant_state(model).graph.layers[-1]
    assert (last.macs, last.weight) == (work, None) and "quant.products" in last.float_reason
    assert quant_state(model).graph.tensors[last.input].fixed_bits == 32


class Sdpa(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


class Attended(nn.Module):
    """A linear layer, which `prepare` requires, followed by the module under test."""

    def __init__(self, kind):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.kind = kind
        self.inner = {
            "mha": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
            "lstm": lambda: nn.LSTM(8, 8, batch_first=True),
            "sdpa": Sdpa,
        }[kind]()

    def forward(self, x):
        x = self.first(x)
        if self.kind == "mha":
            return self.inner(x, x, x)[0]
        return self.inner(x) if self.kind == "sdpa" else self.inner(x)[0]


def test_fused_attention_is_taken_apart():
    work = 5 * 5 * 8
    model = prepare(Attended("mha"), normal(2, 5, 8))
    assert [row[:4] for row in rows(model)[1:]] == [
        ("inner.in_proj", "linear", 5 * 8 * 24, "inner.in_proj.weight"),
        ("inner.scores", "scores", work, None),
        ("inner.values", "values", work, None),
        ("inner.out_proj", "linear", 5 * 8 * 8, "inner.out_proj.weight"),
    ]
    model = prepare(Attended("sdpa"), normal(2, 5, 8))
    assert [row[:4] for row in rows(model)[1:]] == [
        ("inner.scores", "scores", work, None),
        ("inner.values", "values", work, None),
    ]


def test_fused_kernels_without_a_quantized_form_are_counted_and_named():
    with pytest.warns(UserWarning, match="inner.lstm: lstm has no quantized form"):
        model = prepare(Attended("lstm"), normal(2, 5, 8))
    last = quant_state(model).graph.layers[-1]
    assert (last.name, last.macs) == ("inner.lstm", 5 * 2 * 4 * 8 * 8)


def test_slices_of_one_tensor_do_not_share_a_quantizer():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(8, 3)

        def forward(self, x):
            y = torch.relu(x)
            return self.a(y[:, :4]).sum() + self.b(y[: len(y) // 2]).sum()

    model = prepare(Sliced(), normal(4, 8))
    assert {"a.input", "b.input"} <= find_quantizers(model).keys()


def test_transformer_layers_evaluate_quantized():
    """The fused inference kernel would bypass the quantizers and read the float weights."""
    float_model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = normal(2, 5, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prepare(float_model, x, QuantConfig(start_bits=2)).eval()
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x).detach())
    assert not torch.allclose(fast, float_model.eval()(x).detach(), atol=1e-3)


def test_a_sequential_root_works():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    prepared = prepare(model, images())
    assert prepared(images()).shape == (4, 3)


def test_keyword_examples():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, *, values):
            return self.linear(input=values)

    prepared = prepare(Named(), {"values": normal(3, 4)}, calibration=[{"values": normal(3, 4)}])
    assert prepared(values=normal(3, 4)).shape == (3, 2)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.ReLU(), normal(2, 3), "nothing to quantize"),
        (nn.Linear(3, 2), normal(2, 4), "does not run on them"),
        (nn.Linear(3, 2), (), "contains no tensors"),
    ],
)
def test_bad_models_and_examples(model, example, message):
    with pytest.raises(UserError, match=message):
        prepare(model, example)


def test_prepare_refuses_a_prepared_model():
    with pytest.raises(UserError, match="already prepared"):
        prepare(prepare(residual_net(), images()), images())


def test_a_layer_called_with_different_tensors_has_its_own_quantizer():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.cell(torch.tanh(self.cell(x))) + self.other(x)

    model = prepare(Recurrent(), normal(2, 4))
    graph = quant_state(model).graph
    assert [info.macs for info in graph.layers] == [32, 16]
    assert model.cell.input_quantizer is not model.other.input_quantizer
