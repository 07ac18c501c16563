"""What every cost holds; a new one in `COSTS` is tested without new code here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from random_graphs import ends, graphs
from torch import nn

from nipq_search.cost import COSTS, Budget, cost_estimate, cost_penalty, exact_cost
from nipq_search.cost.base import complete_bits
from nipq_search.quant import QuantConfig, prepare, quantizers
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.registry import RegistrationError

pytestmark = pytest.mark.parametrize("name", list(COSTS))


def net(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
        return prepare(model, torch.randn(8, 6), QuantConfig(**options))


@settings(max_examples=40, deadline=None)
@given(graph=graphs())
def test_costs_never_fall_with_more_bits(name, graph):
    least, most = ends(graph)
    assert exact_cost(name, graph, least) <= exact_cost(name, graph, most)
    for tensor in least:
        before = exact_cost(name, graph, least)
        assert exact_cost(name, graph, {**least, tensor: most[tensor]}) >= before
    terms = COSTS[name].terms(graph, complete_bits(graph, least))
    assert all(float(term) >= 0 for term in terms.values())


@settings(max_examples=40, deadline=None)
@given(graph=graphs())
def test_exact_costs_are_plain_numbers(name, graph):
    value = exact_cost(name, graph, ends(graph)[0])
    assert type(value) is (int if COSTS[name].whole else float)
    # Fractional widths, for budgets such as `uniform 2.5`, lie between the whole ones.
    middle = exact_cost(name, graph, {n: b + 0.5 for n, b in ends(graph)[0].items()})
    more = exact_cost(name, graph, {n: b + 1 for n, b in ends(graph)[0].items()})
    assert exact_cost(name, graph, ends(graph)[0]) - 1 <= middle <= more + 1e-9


def test_estimate_equals_exact_at_whole_bits(name):
    model = net()
    for width in (3, 5, 7):
        for quantizer in quantizers(model).values():
            quantizer.start_at(width)
        graph = quant_state(model).graph
        exact = exact_cost(name, graph, dict.fromkeys(quantizers(model), width))
        assert float(cost_estimate(name, model).detach()) == pytest.approx(exact, rel=1e-5, abs=1)
    for quantizer in quantizers(model).values():
        quantizer.freeze()
    exact = exact_cost(name, graph, dict.fromkeys(quantizers(model), 7))
    assert float(cost_estimate(name, model)) == pytest.approx(exact, rel=1e-5, abs=1)


def test_estimate_is_differentiable(name):
    model = net().double()
    names = [n for n, _ in model.named_parameters() if "theta" in n]

    def estimate(*thetas):
        values = dict(zip(names, thetas, strict=True))
        return torch.func.functional_call(
            Shell(model, name), {f"model.{n}": v for n, v in values.items()}
        )

    thetas = [
        torch.full((1,), 0.1 * k - 0.2, dtype=torch.float64, requires_grad=True)
        for k in range(len(names))
    ]
    assert torch.autograd.gradcheck(estimate, thetas)
    assert any(g is not None and g.abs() > 0 for g in grads(estimate(*thetas), thetas))
    assert estimate(*thetas).shape == ()


def grads(value, inputs):
    return torch.autograd.grad(value, inputs, allow_unused=True)


class Shell(nn.Module):
    """Lets `functional_call` compute an estimate."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self):
        return cost_estimate(self.name, self.model)


def test_nothing_searched_still_has_an_estimate(name):
    model = net(pin={"*": "float"})
    assert cost_estimate(name, model).shape == ()
    assert cost_penalty(model, Budget(**{name: 10.0})).isfinite()


@pytest.mark.parametrize("start", [8, 2], ids=["from above", "from below"])
def test_the_penalty_reaches_the_budget(name, start):
    model = net(start_bits=start)
    graph = quant_state(model).graph
    target = exact_cost(name, graph, dict.fromkeys(quantizers(model), 4.5))
    budget = Budget(**{name: target})
    thetas = [p for n, p in model.named_parameters() if "theta" in n]
    optimizer = torch.optim.Adam(thetas, lr=0.05)
    before = float(cost_estimate(name, model).detach())
    for _ in range(200):
        optimizer.zero_grad()
        cost_penalty(model, budget).backward()
        optimizer.step()
    assert float(cost_estimate(name, model).detach()) == pytest.approx(target, rel=0.02)
    assert (before > target) == (start == 8)


def test_a_name_is_taken_once(name):
    with pytest.raises(RegistrationError, match="registered already"):
        COSTS.register(name, COSTS[name])
