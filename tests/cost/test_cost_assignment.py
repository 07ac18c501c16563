"""The mixed-integer program for bit-widths, compared with brute force."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from random_graphs import combinations, problems

from nipq_search.cost import COSTS, Budget, exact_cost
from nipq_search.cost.assignment import GAP, Assignment
from nipq_search.cost.base import Cost, complete_bits, largest_term, sum_terms
from nipq_search.cost.polynomial import Polynomial, polynomial, variable
from nipq_search.cost.projection import (
    MIN_USAGE,
    error_scales,
    max_usage_bits,
    project,
    units_of,
    usage,
)
from nipq_search.quant.graph import Graph, LayerInfo, TensorInfo


def losses_of(graph, scales, units):
    losses = {}
    for name, unit in units.items():
        own = losses.setdefault(unit, dict.fromkeys(graph.tensors[unit].allowed, 0.0))
        for width in own:
            own[width] += scales[name] * 4.0**-width
    return losses


def check(graph, budget, soft, marginal, units):
    losses = losses_of(graph, error_scales(soft, marginal), units)
    found = Assignment(graph, budget, losses, units).min_loss()
    if found is None:
        return False
    floor = {unit: min(of) for unit, of in losses.items()} | found
    bits = {name: floor[unit] for name, unit in units.items()}
    assert usage(graph, bits, budget) <= 1  # tensors that do not contribute cost nothing

    def loss(chosen):
        return sum(losses[unit][chosen[unit]] for unit in found)

    best = min(map(loss, combinations(graph, units, budget)))
    span = max(max(of.values()) - min(of.values()) for of in losses.values())
    assert loss(found) <= best + 10 * GAP * max(best, span)
    return True


@settings(max_examples=150, deadline=None)
@given(problems())
def test_it_finds_the_best_of_all_combinations(problem):
    graph, budget, soft, marginal = problem
    count = 1
    for tensor in graph.tensors.values():
        count *= max(1, len(tensor.allowed))
    if count <= 2000:
        check(graph, budget, soft, marginal, {name: name for name in soft})


def chain(layers=3, groups=(), products=()):
    """Build layers of different costs; tensors may be grouped, and layers may be products."""
    tensors, found = {}, []
    for index in range(layers):
        name = f"l{index}"
        for part, role, numel in (
            ("weight", "weight", 40 * (index + 1)),
            ("input", "activation", 30),
        ):
            full = f"{name}.{part}"
            group = groups[0] if full in groups else None
            tensors[full] = TensorInfo(
                name=full, role=role, numel=numel, allowed=(2, 3, 5, 8), group=group
            )
        second = f"l{index - 1}.input" if index in products else None
        weight = None if second else f"{name}.weight"
        found.append(
            LayerInfo(
                name=name,
                kind="linear",
                macs=100 * (index + 1),
                weight=weight,
                input=f"{name}.input",
                second=second,
            )
        )
    return Graph(layers=tuple(found), tensors=tensors)


@pytest.mark.parametrize("groups", [(), ("l0.weight", "l2.weight"), ("l0.weight", "l0.input")])
@pytest.mark.parametrize("products", [(), (1,), (1, 2)])
@pytest.mark.parametrize("costs", [("bops",), ("bops", "weight_bytes"), ("weight_bytes",)])
def test_groups_products_and_several_costs(groups, products, costs):
    graph = chain(groups=groups, products=products)
    units = {name: tensor.group or name for name, tensor in graph.tensors.items()}
    soft = {name: 3.0 + 0.4 * place for place, name in enumerate(graph.tensors)}
    marginal = {name: -1.0 / (1 + place % 3) for place, name in enumerate(graph.tensors)}
    for width in (2.5, 3.0, 4.4):
        even = dict.fromkeys(graph.tensors, width)
        budget = Budget(**{name: exact_cost(name, graph, even) for name in costs})
        assert check(graph, budget, soft, marginal, units)
        bits = project(graph, budget, soft, marginal)
        assert usage(graph, bits, budget) <= 1
        assert all(bits[a] == bits[b] for a, b in itertools.pairwise(groups))


def test_a_square_of_one_width():
    """A tensor may be multiplied by itself."""
    tensors = {"x": TensorInfo(name="x", role="activation", numel=9, allowed=(2, 4, 8))}
    layer = LayerInfo(name="l", kind="scores", macs=10, weight=None, input="x", second="x")
    graph = Graph(layers=(layer,), tensors=tensors)
    for target, width in ((40, 2), (159, 2), (160, 4), (639, 4), (640, 8)):
        losses = {"x": {2: 3.0, 4: 2.0, 8: 1.0}}
        assert Assignment(graph, Budget(bops=target), losses, {"x": "x"}).min_loss() == {
            "x": width
        }


def test_the_solver_beats_greedy_descent():
    """Greedy descent makes two small savings and then a large one that would have sufficed."""
    tensors = {
        name: TensorInfo(name=name, role="weight", numel=numel, allowed=(2, 8))
        for name, numel in (("a", 80), ("b", 80), ("c", 160))
    }
    graph = Graph(layers=(), tensors=tensors)
    soft = dict.fromkeys(tensors, 8.0)
    target = exact_cost("weight_bytes", graph, soft) - 120
    marginal = {"a": -1.0, "b": -1.0, "c": -2.1}
    assert project(graph, Budget(weight_bytes=target), soft, marginal) == {"a": 2, "b": 2, "c": 8}


def test_non_polynomial_costs_are_projected_greedily():
    graph = chain()
    units = {name: name for name in graph.tensors}
    soft, marginal = dict.fromkeys(units, 4.0), dict.fromkeys(units, -1.0)
    losses = losses_of(graph, error_scales(soft, marginal), units)
    formulas = {
        "rounds": lambda graph, bits: {"x": -(-bits["l0.weight"] // 1)},
        "compares": lambda graph, bits: {"x": max(bits["l0.weight"], bits["l1.weight"])},
        "equals": lambda graph, bits: {"x": 9 if bits["l0.weight"] == 8 else 1},
        "asks": lambda graph, bits: {"x": 9 if bits["l0.weight"] else 1},
        "roots": lambda graph, bits: {"x": bits["l0.weight"] ** 0.5},
        "tensors": lambda graph, bits: {"x": torch.as_tensor(bits["l0.weight"]).log2()},
        "divides": lambda graph, bits: {"x": 1 / bits["l0.weight"] + 9},
        "triples": lambda graph, bits: {
            "x": bits["l0.weight"] * bits["l1.weight"] * bits["l2.weight"]
        },
        "means": lambda graph, bits: {"x": bits["l0.weight"], "y": bits["l1.weight"]},
    }
    for name, terms in formulas.items():
        combine = (lambda t: sum(t.values()) / len(t)) if name == "means" else sum_terms
        cost = Cost(name=name, terms=terms, combine=combine, whole=False)
        with COSTS.temporarily(name, cost):
            assert Assignment(graph, Budget(**{name: 1e9}), losses, units).min_loss() is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300, -1e300])
def test_non_finite_losses_are_projected_too(value):
    graph = chain()
    budget = Budget(bops=exact_cost("bops", graph, dict.fromkeys(graph.tensors, 3.0)))
    soft = dict.fromkeys(graph.tensors, 4.0)
    for marginal in (dict.fromkeys(graph.tensors, value), {"l0.weight": value}):
        assert usage(graph, project(graph, budget, soft, marginal), budget) <= 1


def test_projection_without_scipy_is_greedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    graph = chain()
    budget = Budget(bops=exact_cost("bops", graph, dict.fromkeys(graph.tensors, 3.0)))
    with pytest.warns(UserWarning, match="scipy is missing.*pip install scipy"):
        bits = project(graph, budget, dict.fromkeys(graph.tensors, 4.0), {})
    assert usage(graph, bits, budget) <= 1


def test_polynomials_compute_what_numbers_do():
    a, b = variable("a"), variable("b")
    value = 3 * a * b + (a - 2) * 4 - (5 - b) / 2 + sum([a, b]) - a
    at = {"a": 3.0, "b": 7.0}
    total = 0.0
    for monomial, coefficient in value.terms.items():
        for name in monomial:
            coefficient *= at[name]
        total += coefficient
    assert total == 3 * 3 * 7 + (3 - 2) * 4 - (5 - 7) / 2 + (3 + 7) - 3
    assert value.renamed({"a": "c", "b": "c"}).terms["c", "c"] == 3.0
    with pytest.raises(TypeError):
        1.0 / a
    with pytest.raises(TypeError):
        a / b
    with pytest.raises(TypeError):
        polynomial(object())
    with pytest.raises(TypeError):
        float(a)


@pytest.mark.parametrize("name", sorted(COSTS))
def test_every_registered_cost_is_solvable(name):
    graph = chain(products=(1,))
    widths = {n: variable(n) for n in graph.tensors}
    cost = COSTS[name]
    assert cost.combine in (sum_terms, largest_term)
    for term in cost.terms(graph, complete_bits(graph, widths)).values():
        assert isinstance(polynomial(term), Polynomial)
        assert all(len(monomial) <= 2 for monomial in polynomial(term).terms)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_what_is_reachable_is_used(problem):
    """With coarse widths, a budget may have room that no single raise can use."""
    graph, budget, soft, marginal = problem
    units = {member: unit for unit, of in units_of(graph).items() for member in of}
    used = usage(graph, project(graph, budget, soft, marginal), budget)
    most = max(
        usage(graph, {name: chosen[unit] for name, unit in units.items()}, budget)
        for chosen in combinations(graph, units, budget)
    )
    assert used <= 1 and used >= MIN_USAGE * most
    if (found := max_usage_bits(graph, budget)) is not None:
        assert usage(graph, found, budget) >= (1 - 2 * GAP) * most


def test_whole_bytes_are_compared_with_other_costs_as_they_are_counted():
    """1.75 bytes count as 2 of the 2.5 in the budget, a smaller share than that of the BOPs."""
    graph = Graph(
        layers=(
            LayerInfo(name="a", kind="linear", macs=2, weight="a.weight", input="a.input"),
            LayerInfo(name="b", kind="linear", macs=1, weight="b.weight", input="b.input"),
        ),
        tensors={
            "a.weight": TensorInfo(name="a.weight", role="weight", numel=1, allowed=(2, 3)),
            "a.input": TensorInfo(name="a.input", role="activation", numel=3, allowed=(2, 3)),
            "b.weight": TensorInfo(name="b.weight", role="weight", numel=1, allowed=(2,)),
            "b.input": TensorInfo(
                name="b.input", role="activation", numel=1, allowed=(), scales=0, fixed_bits=8
            ),
        },
    )
    budget = Budget(activation_sum_bytes=2.5, bops=34)
    assert max_usage_bits(graph, budget) == {"a.weight": 3, "a.input": 2, "b.weight": 2}


def test_room_that_requires_two_simultaneous_changes_is_used():
    sizes = {"a": 600, "b": 1000, "c": 800}
    tensors = {
        f"{n}.weight": TensorInfo(name=f"{n}.weight", role="weight", numel=size, allowed=(4, 8))
        for n, size in sizes.items()
    }
    layers = tuple(
        LayerInfo(name=n, kind="linear", macs=size, weight=f"{n}.weight", input=None)
        for n, size in sizes.items()
    )
    graph = Graph(layers=layers, tensors=tensors)
    budget = Budget(weight_bytes=1720)
    # Raising `a` gains the most per byte, but then no other raise fits into the budget.
    marginal = {"a.weight": -3.0, "b.weight": -0.1, "c.weight": -0.1}
    bits = project(graph, budget, dict.fromkeys(tensors, 4.0), marginal)
    assert exact_cost("weight_bytes", graph, bits) >= MIN_USAGE * 1700
