"""Costs compared with manual counts and with qonnx; budgets; the table of layers."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from nipq_search.cost import Budget, cost_penalty, exact_cost, exact_costs, layer_rows, profile
from nipq_search.errors import UserError
from nipq_search.quant import QuantConfig, apply_bit_config, prepare
from nipq_search.quant.insertion.prepare import quant_state


class Net(nn.Module):
    """A network with a stem on raw images, a depthwise and a side branch, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=8)
        self.side = nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.depthwise(x) + self.side(x))
        return self.head(x.mean((2, 3)))


BITS = {
    "weights": {"stem": 3, "depthwise": 5, "side": 2, "head": 8},
    "activations": {"depthwise": 6, "side": 6, "head": 4},
}


@pytest.fixture
def model():
    config = QuantConfig(input_bits=8)
    return apply_bit_config(prepare(Net(), torch.rand(2, 3, 16, 16), config), BITS)


MACS = {
    "stem": 9 * 3 * 8 * 64,
    "depthwise": 3 * 8 * 64,
    "side": 8 * 8 * 64,
    "head": 8 * 5,
}


def test_bops_by_hand(model):
    bops = {
        "stem": MACS["stem"] * 3 * 8,
        "depthwise": MACS["depthwise"] * 5 * 6,
        "side": MACS["side"] * 2 * 6,
        "head": MACS["head"] * 8 * 4,
    }
    assert exact_costs(model)["bops"] == sum(bops.values())
    table = profile(model).set_index("name")
    assert table["macs"].to_dict() == MACS
    assert table["bops"].to_dict() == bops
    assert table["weight_bits"].to_dict() == BITS["weights"]
    assert table["activation_bits"].to_dict() == {"stem": 8, **BITS["activations"]}
    assert table["weight_bytes"]["stem"] == 216 * 3 / 8
    assert list(profile(model)) == [
        "name",
        "kind",
        "macs",
        "weight_bits",
        "activation_bits",
        "bops",
        "weight_bytes",
        "second_activation_bits",
        "why",
    ]


def test_sizes_by_hand(model):
    costs = exact_costs(model)
    packed = 216 * 3 + 24 * 5 + 64 * 2 + 40 * 8
    scales = 8 + 8 + 8 + 5 + 2  # one per weight channel and one per quantized activation
    floats = 16 + 8 + 5  # normalization and biases
    assert costs["weight_bytes"] == math.ceil(packed / 8) + 4 * (scales + floats)
    inputs = {"image": 768 * 8, "shared": 512 * 6, "head": 8 * 4, "sum": 512 * 32}
    assert costs["activation_sum_bytes"] == sum(inputs.values()) / 8
    assert costs["activation_largest_bytes"] == 512 * 32 / 8
    assert costs["mean_weight_bits"] == pytest.approx(packed / 344)
    assert costs["mean_activation_bits"] == pytest.approx((512 * 6 + 8 * 4) / 520)


def test_float_layers_count_32_bits():
    config = QuantConfig(pin={"head": "float", "stem": 8})
    prepared = prepare(Net(), torch.rand(2, 3, 16, 16), config)
    rows = {row["name"]: row for row in profile(prepared).to_dict("records")}
    assert rows["head"]["bops"] == MACS["head"] * 32 * 32
    assert rows["head"]["weight_bytes"] == 40 * 4
    rows = {
        row["name"]: row
        for row in layer_rows(
            quant_state(prepared).graph,
            {name: 8 for name, t in quant_state(prepared).graph.tensors.items() if t.allowed},
        )
    }
    assert rows["head"]["weight_bits"] is None and rows["head"]["activation_bits"] is None
    assert rows["stem"]["bops"] == MACS["stem"] * 64


def test_costs_do_not_depend_on_the_example_batch():
    graphs = [quant_state(prepare(Net(), torch.rand(n, 3, 16, 16))).graph for n in (1, 5)]
    assert graphs[0] == graphs[1]


def test_bops_agree_with_qonnx(model):
    """Compare with the same network, built by hand as an ONNX graph of Quant nodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx import TensorProto, helper
        from qonnx.core.datatype import DataType
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.util.inference_cost import inference_cost

        nodes, initializers = [], []

        def constant(name, value):
            value = torch.as_tensor(value, dtype=torch.float32)
            data = value.flatten().tolist()
            initializers.append(
                helper.make_tensor(name, TensorProto.FLOAT, list(value.shape), data)
            )
            return name

        def quant(source, bits, signed):
            parts = [
                constant(f"{source}_{k}", v)
                for k, v in (("scale", 0.1), ("zero", 0.0), ("bits", float(bits)))
            ]
            nodes.append(
                helper.make_node(
                    "Quant",
                    [source, *parts],
                    [f"{source}_q"],
                    domain="qonnx.custom_op.general",
                    signed=int(signed),
                    narrow=int(signed),
                    rounding_mode="ROUND",
                )
            )
            return f"{source}_q"

        def weight(layer):
            return quant(
                constant(layer, getattr(model, layer).weight.detach()),
                BITS["weights"][layer],
                True,
            )

        def node(kind, inputs, output, **attributes):
            nodes.append(helper.make_node(kind, inputs, [output], **attributes))
            return output

        def conv(x, layer):
            module = getattr(model, layer)
            pads = [*module.padding, *module.padding]
            return node(
                "Conv",
                [x, weight(layer)],
                f"{layer}_out",
                kernel_shape=list(module.kernel_size),
                strides=list(module.stride),
                pads=pads,
                group=module.groups,
            )

        x = quant(node("Relu", [conv("x", "stem")], "r"), BITS["activations"]["side"], False)
        a, b = conv(x, "depthwise"), conv(x, "side")
        x = node("Relu", [node("Add", [a, b], "sum")], "t")
        x = node("Flatten", [node("GlobalAveragePool", [x], "g")], "f")
        x = quant(x, BITS["activations"]["head"], False)
        w = quant(constant("head", model.head.weight.detach().T), BITS["weights"]["head"], True)
        node("MatMul", [x, w], "y")
        graph = helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
            initializers,
        )
        opset = [helper.make_opsetid("", 13), helper.make_opsetid("qonnx.custom_op.general", 1)]
        onnx_model = ModelWrapper(helper.make_model(graph, opset_imports=opset))
        onnx_model.set_tensor_datatype("x", DataType["UINT8"])
        total = inference_cost(onnx_model, discount_sparsity=False)["total_cost"]
    assert int(total["total_bops"]) == exact_costs(model)["bops"]


def test_budgets():
    budget = Budget(bops=5e9, weight_bytes=2_000)
    assert budget == Budget(weight_bytes=2_000.0, bops=5e9) and budget != Budget(bops=5e9)
    assert hash(budget) == hash(copy.deepcopy(budget)) == hash(pickle.loads(pickle.dumps(budget)))
    assert list(budget) == ["bops", "weight_bytes"]
    assert repr(budget) == "Budget(bops=5e+09, weight_bytes=2000)"
    with pytest.raises(AttributeError):
        budget.targets = {}
    with pytest.raises(TypeError):
        budget.targets["bops"] = 1


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "at least one target"),
        ({"bobs": 1e9}, "unknown cost 'bobs'.*did you mean 'bops'"),
        ({"bops": 0}, "bops=0 is not a positive, finite number"),
        ({"bops": -1.0}, "not a positive, finite number"),
        ({"bops": float("nan")}, "not a positive, finite number"),
        ({"bops": float("inf")}, "not a positive, finite number"),
        ({"bops": True}, "not a positive, finite number"),
        ({"bops": "5e9"}, "not a positive, finite number"),
    ],
)
def test_bad_budgets(targets, message):
    with pytest.raises(UserError, match=message):
        Budget(**targets)


def test_unknown_costs_are_named(model):
    with pytest.raises(UserError, match="weight_byte'.*'weight_bytes'"):
        exact_cost("weight_byte", quant_state(model).graph, {})


def test_penalty_is_the_paper_s_on_a_ratio():
    """The paper's smooth L1 (GBOPs, target 5.3, strength 3) equals this penalty times 3 * 5.3."""
    prepared = prepare(Net(), torch.rand(1, 3, 16, 16))
    cost = exact_costs(prepared)["bops"]
    for ratio in (0.5, 0.95, 1.05, 2.0):
        target = cost / ratio
        for quantizer in prepared.modules():
            if hasattr(quantizer, "theta") and not quantizer.is_frozen:
                quantizer.freeze()
        got = 15.9 * float(cost_penalty(prepared, Budget(bops=target)))
        gbops = torch.tensor(5.3 * ratio)
        paper = 3 * float(nn.functional.smooth_l1_loss(gbops, torch.tensor(5.3)))
        assert got == pytest.approx(paper, rel=1e-3)


def test_the_binding_target_counts():
    prepared = prepare(Net(), torch.rand(1, 3, 16, 16))
    costs = exact_costs(prepared)
    both = Budget(bops=costs["bops"] / 2, weight_bytes=costs["weight_bytes"] / 1.1)
    alone = Budget(bops=costs["bops"] / 2)
    assert float(cost_penalty(prepared, both).detach()) == pytest.approx(
        float(cost_penalty(prepared, alone).detach())
    )
