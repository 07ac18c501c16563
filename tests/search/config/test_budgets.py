"""Parsing of budgets, and their absolute targets."""

from __future__ import annotations

import pytest
from unit_helpers import digits, facts_of, make_config

from nipq_search.cost import COSTS, exact_cost
from nipq_search.cost.base import extreme_bits, uniform_bits
from nipq_search.errors import UserError
from nipq_search.search.config.budgets import budget_label, check_budget, resolve_budget
from nipq_search.search.coordinator.resolved import gather


@pytest.fixture(scope="module")
def graph():
    return facts_of(make_config()).graph


@pytest.mark.parametrize("cost", sorted(COSTS))
@pytest.mark.parametrize("bits", [4, 2.5])
def test_uniform_is_the_cost_at_that_width(graph, cost, bits):
    expected = exact_cost(cost, graph, uniform_bits(graph, bits))
    resolved = resolve_budget({cost: f"uniform {bits}"}, graph)
    assert resolved.targets == {cost: expected}
    assert resolved.label == f"{cost}: uniform {bits}"


@pytest.mark.parametrize(
    ("written", "figure"),
    [
        (3_000_000, 3e6),
        (3e6, 3e6),
        ("3_000_000", 3e6),
        ("3e6", 3e6),
        (" uniform   8 ", "uniform8"),
        ("100 %", "uniform8"),
        ("100%", "uniform8"),
    ],
)
def test_numbers_and_percentages(graph, written, figure):
    uniform = exact_cost("bops", graph, uniform_bits(graph, 8))
    expected = uniform if figure == "uniform8" else figure
    assert resolve_budget({"bops": written}, graph).targets["bops"] == pytest.approx(expected)


def test_percentages_are_of_the_uniform_8_bit_model(graph):
    uniform = exact_cost("weight_bytes", graph, uniform_bits(graph, 8))
    resolved = resolve_budget({"weight_bytes": "62.5 %"}, graph)
    assert resolved.targets["weight_bytes"] == pytest.approx(0.625 * uniform)


def test_pinned_layers_keep_their_bits_in_uniform_budgets(graph):
    pinned = facts_of(make_config(quant__pin={"stem*": 8})).graph
    low, high = (resolve_budget({"bops": "uniform 3"}, g).targets["bops"] for g in (graph, pinned))
    assert high > low


def test_an_entry_may_limit_several_costs(graph):
    entry = {"bops": "uniform 4", "weight_bytes": "60 %"}
    resolved = resolve_budget(entry, graph)
    assert list(resolved.targets) == ["bops", "weight_bytes"]
    assert resolved.label == "bops: uniform 4, weight_bytes: 60 %" == budget_label(entry)
    assert resolved.entry == entry


def test_an_unreachable_budget_names_the_least_cost_and_its_layers(graph):
    least = exact_cost("bops", graph, extreme_bits(graph, most=False))
    assert resolve_budget({"bops": least}, graph).targets == {"bops": least}
    with pytest.raises(UserError) as caught:
        resolve_budget({"bops": least - 1}, graph)
    message = str(caught.value)
    assert message.startswith(f"budgets: {{bops: {least - 1}}}: bops: the target")
    assert f"{least:,.6g}" in message and "set by" in message
    largest = max(graph.layers, key=lambda layer: layer.macs)
    assert largest.name in message and "%" in message


@pytest.mark.parametrize(
    "figure", [0, -1, True, float("inf"), "0", "nan", "uniform 0", "uniform 17"]
)
def test_invalid_targets(figure):
    with pytest.raises(UserError, match=r"^budgets\.bops: "):
        check_budget({"bops": figure})


def test_budgets_with_equal_targets_are_rejected():
    config = make_config(budgets=[{"bops": "uniform 8"}, {"bops": "100 %"}])
    with pytest.raises(UserError, match="bops: uniform 8 and bops: 100 % are equal"):
        gather(config, digits())


def test_facts_of_a_sweep():
    config = make_config()
    facts = facts_of(config)
    assert [b.label for b in facts.budgets] == ["bops: uniform 4", "bops: uniform 3"]
    assert (facts.front_cost, facts.metric, facts.mode) == ("bops", "accuracy", "max")
    for costs in facts.costs.values():
        assert costs["least"] <= costs["uniform8"] <= costs["greatest"] <= costs["float"]
    assert facts.axis == (facts.costs["bops"]["least"], facts.costs["bops"]["uniform8"])
    told = facts.as_json()
    keys = {"budgets", "front_cost", "metric", "mode", "axis", "costs", "least_set_by"}
    assert set(told) == keys and told["least_set_by"].keys() == facts.costs.keys()
    assert " %" in told["least_set_by"]["bops"]


def test_budgets_keep_the_order_of_an_earlier_run():
    config = make_config(budgets=[{"weight_bytes": "uniform 4"}, {"bops": "uniform 3"}])
    facts = gather(config, digits(), [{"bops": "uniform 3"}])
    assert [b.label for b in facts.budgets] == ["bops: uniform 3", "weight_bytes: uniform 4"]
