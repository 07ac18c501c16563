"""The guarantees of the projection: the bit-widths meet the budget and use it up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from random_graphs import combinations, ends, problems
from torch import nn

from nipq_search.cost import Budget, exact_cost, exact_costs, freeze, project
from nipq_search.cost.base import hard_bits
from nipq_search.cost.projection import error_scales, is_tight, units_of, usage
from nipq_search.errors import UserError
from nipq_search.quant import QuantConfig, WeightConfig, prepare, quantizers
from nipq_search.quant.graph import Graph, LayerInfo, TensorInfo
from nipq_search.quant.insertion.prepare import quant_state


def fits(graph, bits, budget):
    return all(exact_cost(name, graph, bits) <= budget.targets[name] for name in budget)


def some_raise_fits(graph, bits, budget):
    return any(
        fits(graph, {**bits, name: width}, budget)
        for name, tensor in graph.tensors.items()
        for width in tensor.allowed
        if width > bits[name]
    )


def used(graph, bits, budget):
    return max(exact_cost(n, graph, bits) / target for n, target in budget.targets.items())


@settings(max_examples=250, deadline=None)
@given(problems())
def test_projection_satisfies_its_guarantee(problem):
    graph, budget, soft, marginal = problem
    bits = project(graph, budget, soft, marginal)
    assert all(bits[name] in graph.tensors[name].allowed for name in soft)
    assert bits.keys() == soft.keys()
    assert fits(graph, bits, budget)
    tight = used(graph, bits, budget) >= 0.97 or not some_raise_fits(graph, bits, budget)
    assert tight and is_tight(graph, bits, budget)
    assert project(graph, budget, soft, marginal) == bits


@settings(max_examples=60, deadline=None)
@given(problems())
def test_tightness_agrees_with_brute_force(problem):
    graph, budget, _, _ = problem
    units = {member: unit for unit, of in units_of(graph).items() for member in of}
    most = max(
        used(graph, {name: chosen[unit] for name, unit in units.items()}, budget)
        for chosen in combinations(graph, units, budget)
    )
    assume(most > 0)  # some generated costs are 0 at every width
    for bits in ends(graph):
        inside, share = fits(graph, bits, budget), used(graph, bits, budget) / most
        if not inside or abs(share - 0.97) > 1e-3:  # outside the solver's optimality gap
            assert is_tight(graph, bits, budget) == (inside and share > 0.97)
        assert usage(graph, bits, budget) == pytest.approx(used(graph, bits, budget))


def pair(widths=(2, 3, 4, 5, 6, 7, 8), numels=(100, 100)):
    """Build a graph of two layers with separate inputs."""
    tensors, layers = {}, []
    for name, numel in zip("ab", numels, strict=True):
        for role, kind in (("weight", "weight"), ("input", "activation")):
            full = f"{name}.{role}"
            tensors[full] = TensorInfo(name=full, role=kind, numel=numel, allowed=widths)
        layers.append(
            LayerInfo(
                name=name, kind="linear", macs=100, weight=f"{name}.weight", input=f"{name}.input"
            )
        )
    return Graph(layers=tuple(layers), tensors=tensors)


def test_sensitive_tensors_keep_their_bits():
    graph = pair()
    soft = dict.fromkeys(graph.tensors, 5.0)
    marginal = dict.fromkeys(graph.tensors, -0.001) | {"a.weight": -1.0, "a.input": -1.0}
    bits = project(graph, Budget(bops=100 * 16 * 2), soft, marginal)
    assert bits["a.weight"] > bits["b.weight"] and bits["a.input"] > bits["b.input"]


def test_largest_tensors_are_lowered_and_nothing_else():
    """Two tensors determine the cost together: lowering only one saves nothing."""
    graph = pair()
    soft = dict.fromkeys(graph.tensors, 8.0)
    bits = project(
        graph, Budget(activation_largest_bytes=50), soft, dict.fromkeys(graph.tensors, -1.0)
    )
    assert bits == {"a.weight": 8, "b.weight": 8, "a.input": 4, "b.input": 4}


def test_uncounted_tensors_keep_their_learned_bits():
    graph = pair()
    soft = dict.fromkeys(graph.tensors, 3.0) | {"a.weight": 6.0, "b.weight": 6.0}
    bits = project(graph, Budget(weight_bytes=100), soft, dict.fromkeys(graph.tensors, -1.0))
    assert bits["a.weight"] + bits["b.weight"] == 8
    assert bits["a.input"] == bits["b.input"] == 3


@pytest.mark.parametrize("width", [2, 8])
def test_exact_targets_of_a_mean_are_reached(width):
    sizes = (16, 64, 24, 10, 8, 64)
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    model = prepare(nn.Sequential(*layers), torch.randn(4, 16), QuantConfig(start_bits=8))
    freeze(model, Budget(mean_weight_bits=float(width)))
    weights = {n: b for n, b in hard_bits(model).items() if n.endswith("weight")}
    assert set(weights.values()) == {width}


def test_error_scales():
    scales = error_scales({"a": 4.0, "b": 4.0, "c": 2.0}, {"a": -2.0, "b": -1.0, "c": 0.5})
    assert scales["a"] == pytest.approx(2 * scales["b"])
    assert 0 < scales["c"] < scales["b"]
    assert error_scales({"a": 4.0, "b": 2.0}, {}) == {"a": 256.0, "b": 16.0}


def test_unreachable_budgets_name_the_least_cost_and_its_layers():
    graph = pair(numels=(900, 100))
    with pytest.raises(
        UserError, match=r"bops: .*least reachable cost 800 \(set by a: 50 %, b: 50"
    ):
        project(graph, Budget(bops=799), {}, {})
    with pytest.raises(
        UserError, match=r"weight_bytes: the target 10 .* 250 \(set by a.weight: 90"
    ):
        project(graph, Budget(weight_bytes=10), {}, {})
    assert (
        project(graph, Budget(bops=800), dict.fromkeys(graph.tensors, 8.0), {}) == ends(graph)[0]
    )


def net(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
        x = torch.randn(8, 20)
    return prepare(model, x, QuantConfig(**options)), x


@pytest.mark.parametrize("quantizer", ["nipq", "lsq"])
def test_freeze_keeps_the_budget(quantizer):
    for target in (4000, 9000, 25_000):
        model, x = net(quantizer=quantizer, weights=WeightConfig(bits=(2, 4, 8)))
        model(x).square().sum().backward()
        budget = Budget(bops=target, weight_bytes=900)
        assert freeze(model, budget) is model
        assert usage(quant_state(model).graph, hard_bits(model), budget) <= 1
        bits = {n: q.bits.hard() for n, q in quantizers(model).items()}
        assert is_tight(quant_state(model).graph, bits, budget)
        costs = exact_costs(model)
        assert costs["bops"] <= target and costs["weight_bytes"] <= 900


def test_freeze_without_a_budget_takes_the_nearest_width():
    model, _ = net(start_bits=5)
    freeze(model)
    assert all(q.bits.is_frozen and q.bits.hard() == 5 for q in quantizers(model).values())


def test_freezing_again_changes_nothing():
    model, _ = net(start_bits=5)
    freeze(model)
    before = {n: q.bits.hard() for n, q in quantizers(model).items()}
    freeze(model, Budget(bops=1e9))
    assert before == {n: q.bits.hard() for n, q in quantizers(model).items()}
    with pytest.raises(UserError, match="already frozen, at a cost above"):
        freeze(model, Budget(bops=3500))


def test_an_unreachable_budget_freezes_nothing():
    model, _ = net()
    with pytest.raises(UserError, match="least reachable cost"):
        freeze(model, Budget(bops=10))
    assert not any(q.bits.is_frozen for q in quantizers(model).values())
