"""The least costs that the allowed bit-widths can reach, and budgets below them."""

from __future__ import annotations

from nipq_search.cost.base import complete_bits, exact_cost, extreme_bits, get_cost
from nipq_search.cost.budget import Budget
from nipq_search.errors import UserError
from nipq_search.quant.graph import Graph


def largest_terms(name: str, graph: Graph) -> str:
    """Return a description of the largest terms of the least reachable cost.

    It names at most three terms with their shares of the sum of all terms, as in
    `a: 50 %, b: 20 %`.
    """
    terms = get_cost(name).terms(graph, complete_bits(graph, extreme_bits(graph, most=False)))
    total = sum(float(term) for term in terms.values()) or 1.0
    largest = sorted(terms.items(), key=lambda item: -float(item[1]))[:3]
    return ", ".join(f"{layer}: {100 * float(v) / total:.0f} %" for layer, v in largest)


def check_reachable(graph: Graph, budget: Budget) -> None:
    """Check that the smallest allowed bit-widths meet the budget.

    Raises:
        UserError: a target is below the least reachable cost; the message names the largest terms
            of that cost.
    """
    bits = extreme_bits(graph, most=False)
    for name, target in budget.targets.items():
        least = exact_cost(name, graph, bits)
        if least <= target:
            continue
        raise UserError(
            f"{name}: the target {target:,.10g} is below the least reachable cost {least:,.10g} "
            f"(set by {largest_terms(name, graph)}); raise the target, allow smaller bit-widths, "
            "or unpin layers"
        )
