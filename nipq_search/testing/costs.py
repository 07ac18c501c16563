"""Conformance suite for costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from nipq_search.cost import COSTS, Budget, Cost, cost_estimate, cost_penalty, exact_cost
from nipq_search.cost.base import complete_bits
from nipq_search.quant import QuantConfig, prepare, quantizers
from nipq_search.quant.graph import Graph
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.testing.graphs import ends, graphs

# Hypothesis rejects a test function that runs on instances of different classes, as inherited
# tests do, unless `differing_executors` is suppressed.
_SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors]
)


def net(**options: Any) -> nn.Module:
    """Return a prepared model of two linear layers; `options` are arguments of `QuantConfig`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
        return prepare(model, torch.randn(8, 6), QuantConfig(**options))


class _Estimate(nn.Module):
    """A module whose forward pass computes a cost estimate, for use with `functional_call`."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self) -> Tensor:
        return cost_estimate(self.name, self.model)


class CostConformance:
    """Properties of every cost.

    Attributes:
        cost: the cost under test.
    """

    cost: ClassVar[Cost]

    @pytest.fixture(autouse=True)
    def _registered(self) -> Iterator[None]:
        with COSTS.temporarily(self.cost.name, self.cost):
            yield

    @_SETTINGS
    @given(graph=graphs())
    def test_costs_never_decrease_with_more_bits(self, graph: Graph) -> None:
        """Raising one or all bit-widths never lowers the cost, and no term is negative."""
        name, (least, most) = self.cost.name, ends(graph)
        assert exact_cost(name, graph, least) <= exact_cost(name, graph, most)
        for tensor in least:
            before = exact_cost(name, graph, least)
            assert exact_cost(name, graph, {**least, tensor: most[tensor]}) >= before
        terms = self.cost.terms(graph, complete_bits(graph, least))
        assert all(float(term) >= 0 for term in terms.values())

    @_SETTINGS
    @given(graph=graphs())
    def test_exact_costs_are_plain_numbers(self, graph: Graph) -> None:
        """Exact costs are integers if `whole` is set, and floats otherwise.

        At fractional bit-widths, they lie between those at the neighboring integers, up to
        rounding.
        """
        name, (least, _) = self.cost.name, ends(graph)
        value = exact_cost(name, graph, least)
        assert type(value) is (int if self.cost.whole else float)
        # Budgets such as `uniform 2.5` evaluate the exact cost at fractional bit-widths.
        middle = exact_cost(name, graph, {n: b + 0.5 for n, b in least.items()})
        more = exact_cost(name, graph, {n: b + 1 for n, b in least.items()})
        assert exact_cost(name, graph, least) - 1 <= middle <= more + 1e-9

    def test_estimate_equals_exact_cost_at_integer_bits(self) -> None:
        """At integer bit-widths, learned or frozen, the estimate equals the exact cost."""
        name, model = self.cost.name, net()
        graph = quant_state(model).graph
        for width in (3, 5, 7):
            for quantizer in quantizers(model).values():
                quantizer.start_at(width)
            exact = exact_cost(name, graph, dict.fromkeys(quantizers(model), width))
            estimate = float(cost_estimate(name, model).detach())
            assert estimate == pytest.approx(exact, rel=1e-5, abs=1)
        for quantizer in quantizers(model).values():
            quantizer.freeze()
        exact = exact_cost(name, graph, dict.fromkeys(quantizers(model), 7))
        assert float(cost_estimate(name, model)) == pytest.approx(exact, rel=1e-5, abs=1)

    def test_estimate_is_differentiable(self) -> None:
        """The estimate is a scalar whose gradient agrees with finite differences."""
        model = net().double()
        names = [n for n, _ in model.named_parameters() if "theta" in n]

        def estimate(*thetas: Tensor) -> Tensor:
            values = dict(zip(names, thetas, strict=True))
            found: Tensor = torch.func.functional_call(
                _Estimate(model, self.cost.name), {f"model.{n}": v for n, v in values.items()}
            )
            return found

        thetas = [
            torch.full((1,), 0.1 * k - 0.2, dtype=torch.float64, requires_grad=True)
            for k in range(len(names))
        ]
        assert torch.autograd.gradcheck(estimate, thetas)
        gradients = torch.autograd.grad(estimate(*thetas), thetas, allow_unused=True)
        assert any(g is not None and g.abs() > 0 for g in gradients)
        assert estimate(*thetas).shape == ()

    def test_models_without_searched_tensors_have_an_estimate(self) -> None:
        """The estimate and the penalty are defined for a model without quantized tensors."""
        model = net(pin={"*": "float"})
        assert cost_estimate(self.cost.name, model).shape == ()
        assert cost_penalty(model, Budget(**{self.cost.name: 10.0})).isfinite()

    @pytest.mark.parametrize("start", [8, 2], ids=["from above", "from below"])
    def test_the_penalty_reaches_the_budget(self, start: int) -> None:
        """Minimizing the penalty alone moves the estimate to the target, from above and below."""
        name, model = self.cost.name, net(start_bits=start)
        graph = quant_state(model).graph
        target = exact_cost(name, graph, dict.fromkeys(quantizers(model), 4.5))
        budget = Budget(**{name: target})
        thetas = [p for n, p in model.named_parameters() if "theta" in n]
        optimizer = torch.optim.Adam(thetas, lr=0.05)
        before = float(cost_estimate(name, model).detach())
        for _ in range(200):
            optimizer.zero_grad()
            cost_penalty(model, budget).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        assert float(cost_estimate(name, model).detach()) == pytest.approx(target, rel=0.02)
        assert (before > target) == (start == 8)
