"""Selection of layers, pinned bit-widths, and groups that share a bit-width."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nipq_search.cost import Budget, exact_cost, freeze
from nipq_search.cost.base import hard_bits, uniform_bits
from nipq_search.cost.projection import is_tight
from nipq_search.errors import UserError
from nipq_search.quant import QuantConfig, apply_bit_config, bit_config, prepare, quantizers
from nipq_search.quant.insertion.prepare import quant_state


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)

    def forward(self, x, memory):
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        return self.out(nn.functional.scaled_dot_product_attention(q.tanh(), k, v))


class Encoder(nn.Module):
    """A language model with two attention blocks and residual sums."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.one, self.two = Attention(), Attention()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids, other):
        x, memory = self.embed(ids), self.embed(other).relu()
        x = self.norm(x + self.one(x, x))
        x = x + self.two(x, memory)
        return self.head(x.mean(1))


IDS = (torch.arange(10).view(2, 5), torch.arange(6).view(2, 3) + 2)


def prepared(**options):
    torch.manual_seed(0)
    return prepare(Encoder(), IDS, QuantConfig(**options))


def groups(model):
    found: dict[str, list[str]] = {}
    for name, tensor in quant_state(model).graph.tensors.items():
        if tensor.group is not None:
            found.setdefault(tensor.group, []).append(name)
    return sorted(sorted(members) for members in found.values())


def in_float(model):
    return {layer.name for layer in quant_state(model).graph.layers if layer.float_reason}


def test_projections_that_one_attention_multiplies():
    assert groups(prepared(groups=("qkv",))) == [
        ["one.k.weight", "one.q.weight", "one.v.weight"],  # all three consume the same tensor
        ["two.k.weight", "two.v.weight"],  # the query projects a different tensor
    ]


def test_residual_streams():
    assert groups(prepared(groups=("residual",), residuals=True)) == [["add", "add_1"]]


def test_patterns():
    model = prepared(groups=("*.out", ("*.q", "head")))
    assert groups(model) == [
        ["head.input", "one.q.input", "two.q.input"],
        ["head.weight", "one.q.weight", "two.q.weight"],
        ["one.out.input", "two.out.input"],
        ["one.out.weight", "two.out.weight"],
    ]
    overlapping = groups(prepared(groups=("*.out", ("one.*", "head"))))
    assert len(overlapping) == 2
    assert {"head.weight", "one.q.weight", "two.out.weight"} <= set(overlapping[1])
    assert {"head.input", "one.scores.second", "two.out.input"} <= set(overlapping[0])


@pytest.mark.parametrize("quantizer", ["nipq", "lsq"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_groups_share_their_bits_for_good(quantizer, share):
    model = prepared(groups=("qkv", "residual", "*.out"), residuals=True, quantizer=quantizer)
    graph = quant_state(model).graph
    if quantizer == "nipq":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(4):
            optimizer.zero_grad()
            (model(*IDS).square().sum() * 10).backward()
            optimizer.step()
        soft = {n: float(q.bits.soft().detach()) for n, q in quantizers(model).items()}
        assert len({soft[n] for n in ("one.q.weight", "one.k.weight", "one.v.weight")}) == 1
        copied = copy.deepcopy(model)
        found = quantizers(copied)
        assert found["one.q.weight"].bits.theta is found["one.k.weight"].bits.theta
        assert found["one.q.weight"].bits.theta is not quantizers(model)["one.q.weight"].bits.theta
    budget = Budget(bops=share * exact_cost("bops", graph, uniform_bits(graph, 8)))
    learning = copy.deepcopy(model)
    freeze(model, budget)
    bits = hard_bits(model)
    for group in groups(model):
        assert len({bits[name] for name in group}) == 1
    assert is_tight(graph, bits, budget)
    # Loading a frozen state freezes a copy. Loading an unfrozen state unfreezes it; the
    # widths of a group stay tied.
    other = prepared(groups=("qkv", "residual", "*.out"), residuals=True, quantizer=quantizer)
    other.load_state_dict(model.state_dict())
    assert hard_bits(other) == bits
    other.load_state_dict(learning.state_dict())
    found = quantizers(other)
    assert found["one.q.weight"].bits.theta is found["one.k.weight"].bits.theta
    again = prepared(groups=("qkv", "residual", "*.out"), residuals=True, quantizer=quantizer)
    assert bit_config(apply_bit_config(again, bit_config(model))) == bit_config(model)
    broken = bit_config(model)
    broken["weights"]["one.q"] = 2 if bits["one.q.weight"] != 2 else 3
    fresh = prepared(groups=("qkv", "residual", "*.out"), residuals=True, quantizer=quantizer)
    with pytest.raises(UserError, match="its group has"):
        apply_bit_config(fresh, broken)


def test_members_of_a_group_draw_one_width():
    model = prepared(groups=("qkv",))
    found = quantizers(model)
    drawn = {}
    for name in ("one.q.weight", "one.k.weight"):
        bits = found[name].bits
        original = bits.draw
        bits.draw = lambda u, step, n=name, f=original: (
            drawn.setdefault(n, []).append(u) or f(u, step)
        )
    for _ in range(5):
        model(*IDS)
    assert drawn["one.q.weight"] == drawn["one.k.weight"] and len(set(drawn["one.q.weight"])) == 5


def test_pins_and_groups_agree_or_say_why_not():
    model = prepared(groups=("qkv",), pin={"one.q": 5})
    assert quant_state(model).graph.tensors["one.k.weight"].allowed == (5,)
    with pytest.raises(UserError, match="no allowed bit-width in common"):
        prepared(groups=(("one.out", "head"),), pin={"one.out": 5, "head": 6})
    with pytest.raises(UserError, match=r"quant.groups.\*.quit: no layer.*name"):
        prepared(groups=("*.quit",))


def test_selection_by_name_kind_and_place():
    everything = {layer.name for layer in quant_state(prepared()).graph.layers}
    assert in_float(prepared()) == set()
    assert in_float(prepared(exclude=("one.*", "kind:embedding"))) == {
        name for name in everything if name.startswith("one.")
    } | {"embed"}
    assert in_float(prepared(include=("kind:linear",))) == {
        name for name in everything if "scores" in name or "values" in name or name == "embed"
    }
    model = prepared(pin={"order:first": 8, "order:last": 7, "kind:embedding": 6})
    tensors = quant_state(model).graph.tensors
    assert tensors["one.q.weight"].allowed == (8,)
    assert tensors["head.weight"].allowed == (7,) and tensors["embed.weight"].allowed == (6,)
    assert len(tensors["two.q.weight"].allowed) > 1
    model = prepared(pin={"one.scores": 4})
    tensors = quant_state(model).graph.tensors
    assert tensors["one.scores.input"].allowed == tensors["one.scores.second"].allowed == (4,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ("hed",)}, "quant.exclude.hed: no layer has this name .*'head'"),
        ({"include": ("kind:conv2d",)}, "quant.include.kind:conv2d: no layer of this kind; the"),
        ({"pin": {"order:middle": 4}}, "order:middle: no layer has this order; use order:first"),
        ({"groups": ("nothing*",)}, "quant.groups.nothing"),
    ],
)
def test_patterns_that_match_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        prepared(**options)


@pytest.mark.parametrize("key", ["exclude", "include", "groups"])
def test_a_string_is_not_a_list_of_patterns(key):
    with pytest.raises(UserError, match=f"quant.{key}: give a list"):
        QuantConfig(**{key: "head"})


def test_what_nobody_counts_keeps_its_bits():
    """An embedding costs no BOPs, so under a BOPs budget it starts at its largest width."""
    from nipq_search.train.starts.start import start_at_budget

    model = prepared()
    graph = quant_state(model).graph
    budget = Budget(bops=exact_cost("bops", graph, uniform_bits(graph, 3)))
    start_at_budget(model, budget)
    soft = {n: float(q.bits.soft().detach()) for n, q in quantizers(model).items()}
    assert soft["embed.weight"] > 7.5 and soft["head.weight"] == pytest.approx(3, abs=0.01)
    assert hard_bits(freeze(model, budget))["embed.weight"] == 8
