"""Hypothesis strategies for bit-widths, budgets, and small graphs of layers and tensors."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from nipq_search.cost import COSTS, Budget, exact_cost
from nipq_search.cost.projection import usage
from nipq_search.testing.graphs import ends, graphs

__all__ = ["combinations", "ends", "graphs", "problems"]


@st.composite
def problems(draw):
    """Draw a graph, a reachable budget of one to three costs, soft bits and marginal losses."""
    graph = draw(graphs())
    least, most = ends(graph)
    targets = {}
    for name in draw(
        st.lists(st.sampled_from(sorted(COSTS)), min_size=1, max_size=3, unique=True)
    ):
        low, high = exact_cost(name, graph, least), exact_cost(name, graph, most)
        target = low + (high - low) * draw(st.floats(0.0, 1.2))
        targets[name] = max(target, 1e-6)
    soft = {n: least[n] + (most[n] - least[n]) * draw(st.floats(0, 1)) for n in least}
    marginal = {n: draw(st.floats(-1, 0.1)) for n in least}
    return graph, Budget(**targets), soft, marginal


def combinations(graph, units, budget):
    """Yield every choice of one width per unit that meets the budget."""
    alone = list(dict.fromkeys(units.values()))
    for widths in itertools.product(*(graph.tensors[unit].allowed for unit in alone)):
        chosen = dict(zip(alone, widths, strict=True))
        bits = {name: chosen[unit] for name, unit in units.items()}
        if usage(graph, bits, budget) <= 1:
            yield chosen
