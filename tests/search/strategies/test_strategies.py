"""Strategies: the assignment of budgets and parents, and what a warm start copies."""

from __future__ import annotations

import pytest
import torch

from nipq_search.cost import Budget
from nipq_search.cost.base import exact_cost
from nipq_search.cost.projection import freeze, usage
from nipq_search.quant import QuantConfig, prepare, quantizers
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.search.strategies.expected_gain import Axes
from nipq_search.search.strategies.strategies import Fill, FinishedTrial, Ladder, SearchState
from nipq_search.train.starts.start import bits_at_budget, start_at_budget, warm_start


def finished(number, bops, metric, **cost):
    return FinishedTrial(number=number, cost={"bops": bops, **cost}, metric=metric)


def test_ladder_takes_the_nearest_at_an_equal_or_larger_budget():
    trials = [finished(0, 400, 0.9), finished(1, 200, 0.8), finished(2, 50, 0.7)]
    ladder = Ladder()
    assert ladder.parent({"bops": 100}, trials) == 1
    assert ladder.parent({"bops": 300}, trials) == 0
    assert ladder.parent({"bops": 500}, trials) is None
    assert ladder.parent({"bops": 100}, []) is None


def test_ladder_takes_the_better_of_two_equally_near():
    trials = [finished(0, 100, 0.8), finished(1, 99, 0.9), finished(2, 98, 0.85)]
    assert Ladder().parent({"bops": 100}, trials) == 1


def test_ladder_considers_every_target_of_a_budget():
    trials = [finished(0, 200, 0.9, weight_bytes=10), finished(1, 300, 0.8, weight_bytes=40)]
    assert Ladder().parent({"bops": 100, "weight_bytes": 20}, trials) == 1


@pytest.mark.parametrize("strategy", [Ladder(), Fill()])
@pytest.mark.parametrize(
    ("targets", "cost"),
    [
        ({"bops": 100.0, "weight_bytes": 60.0}, {"bops": 98.5, "weight_bytes": 44.0}),
        ({"bops": 100.0}, {"bops": 64.0}),
    ],
    ids=["another target binds", "coarse widths"],
)
def test_a_trial_can_be_a_parent_for_its_own_budget(strategy, targets, cost):
    """A trial counts as being at its target even if it cannot use up the target."""
    trial = FinishedTrial(number=3, cost=cost, metric=0.9, targets=targets)
    assert strategy.parent(targets, [trial]) == 3
    assert strategy.parent({**targets, "bops": 110.0}, [trial]) is None
    again = strategy.epochs_share(targets, trial)
    assert again == (1.0 if isinstance(strategy, Fill) else 1 / 3)


def test_fill_serves_budgets_without_a_target_for_the_fronts_cost():
    axes = Axes(cost="bops", least=2.0, most=64.0, reference=0.7, best=0.9)
    budgets = [{"bops": 16.0}, {"bops": 8.0}, {"weight_bytes": 50.0}]
    assigned, trials = [], []
    for number in range(20):
        target = Fill().assign(
            SearchState(budgets=budgets, assigned=list(assigned), finished=list(trials), axes=axes)
        )
        asked = dict(target.targets or budgets[target.budget])
        assert 8.0 <= asked.get("bops", 8.0) <= 16.0
        assigned.append(target.budget)
        cost = {"bops": 12.0, "weight_bytes": 100.0} | asked
        trials.append(FinishedTrial(number=number, cost=cost, metric=0.9 - 1 / cost["bops"]))
    assert 6 <= assigned.count(2) <= 8


def test_fill_serves_budgets_with_equal_targets_for_the_fronts_cost():
    """Each budget is assigned, and a repeat keeps the other targets of the repeated trial."""
    axes = Axes(cost="bops", least=2.0, most=64.0, reference=0.7, best=0.9)
    budgets = [
        {"bops": 16.0, "weight_bytes": 50.0},
        {"bops": 16.0, "weight_bytes": 100.0},
        {"bops": 8.0, "weight_bytes": 100.0},
    ]
    assigned, trials = [], []
    for number in range(24):
        target = Fill().assign(
            SearchState(budgets=budgets, assigned=list(assigned), finished=list(trials), axes=axes)
        )
        asked = dict(target.targets or budgets[target.budget])
        there = [t for t in trials if t.cost["bops"] == asked["bops"]]
        if there and target.targets:
            best = max(there, key=lambda t: t.metric)
            assert best.targets["weight_bytes"] == asked["weight_bytes"]
        assigned.append(target.budget)
        metric = 0.9 - 1 / asked["bops"] - 0.1 / asked["weight_bytes"]
        trials.append(FinishedTrial(number=number, cost=asked, metric=metric, targets=asked))
    assert min(assigned.count(index) for index in range(3)) >= 3


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 4, 3),
    )


def prepared(quantizer, seed):
    inputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return prepare(model(), inputs, QuantConfig(quantizer=quantizer, seed=seed)), inputs


@pytest.mark.parametrize("quantizer", ["nipq", "lsq"])
def test_warm_start_copies_everything_except_noise_and_phase(quantizer):
    parent, inputs = prepared(quantizer, 1)
    parent.train()(inputs)
    graph = quant_state(parent).graph
    budget = Budget(bops=exact_cost("bops", graph, dict.fromkeys(quantizers(parent), 5)))
    freeze(parent, budget)
    child, _ = prepared(quantizer, 2)
    bits = warm_start(child, parent.state_dict())
    assert bits == {name: q.bits.hard() for name, q in quantizers(parent).items()}
    assert not any(q.bits.is_frozen for q in quantizers(child).values())
    assert quant_state(child).clock.seed == 2
    assert quant_state(child).clock.step == 0
    assert torch.equal(child[0].weight, parent[0].weight)
    assert torch.equal(child[1].running_mean, parent[1].running_mean)
    for name, q in quantizers(child).items():
        x = torch.zeros(8, 1, 1, 1)
        mine, theirs = (
            each.boundary_for(x).range(4).high for each in (q, quantizers(parent)[name])
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    freeze(child, budget)
    assert {n: q.bits.hard() for n, q in quantizers(child).items()} == {
        n: q.bits.hard() for n, q in quantizers(parent).items()
    }


def test_start_at_the_budget_keeps_differences_between_layers():
    net, _ = prepared("nipq", 1)
    graph = quant_state(net).graph
    budget = Budget(bops=exact_cost("bops", graph, dict.fromkeys(quantizers(net), 4)))
    uniform = bits_at_budget(graph, budget)
    assert all(abs(bits - 4) < 1e-6 for bits in uniform.values())
    base = {name: 5.0 + index for index, name in enumerate(quantizers(net))}
    shifted = bits_at_budget(graph, budget, base)
    assert usage(graph, shifted, budget) == pytest.approx(1.0)
    shifts = [bits - base[name] for name, bits in shifted.items() if 2 < bits < 8]
    assert shifts == pytest.approx([shifts[0]] * len(shifts))
    start_at_budget(net, budget, base)
    for name, quantizer in quantizers(net).items():
        assert float(quantizer.bits.soft().detach()) == pytest.approx(
            min(max(shifted[name], 2.3), 7.7), abs=0.05
        )
