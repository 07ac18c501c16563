"""The bit-widths of least predicted loss under budgets, by a mixed-integer program.

Each tensor, or group of tensors, chooses one of its allowed widths: a binary variable for each.
The product of two widths, as BOPs have it, is a variable for each pair of widths whose sums over
either are the choices of the other, so that every cost is linear. HiGHS solves it, through scipy.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from nipq_search.cost.base import complete_bits, get_cost, largest_term, sum_terms
from nipq_search.cost.budget import Budget
from nipq_search.cost.polynomial import Polynomial, polynomial, variable
from nipq_search.quant.graph import Graph

NODES = 2000
"""Branches that the solver looks at: a limit in time would give other bits on another machine."""

GAP = 1e-4
"""Share of the least predicted loss that is as good as it."""

_MARGINS = (0.0, 2e-6)
"""The solver keeps a budget up to rounding: where that breaks it, it is to stay below by more."""


class _Program:
    """Columns and rows of the mixed-integer program."""

    def __init__(self) -> None:
        self.count = 0
        self.costs: list[float] = []
        self.binary: list[int] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []

    def column(self, cost: float = 0.0, binary: bool = False) -> int:
        """A variable from 0 to 1."""
        self.costs.append(cost)
        self.binary.append(int(binary))
        self.count += 1
        return self.count - 1

    def row(self, entries: Mapping[int, float], least: float, most: float) -> None:
        """Bound a sum of variables with coefficients."""
        self.rows.append((dict(entries), least, most))

    def solve(self) -> np.ndarray | None:
        """The variables at the least cost; None where that was not proven within `NODES`."""
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp  # takes a while to load
            from scipy.sparse import coo_array
        except ImportError:
            warnings.warn(
                "scipy is missing: bit-widths are brought below the budget by a search, which "
                "may leave better ones unfound. pip install scipy",
                stacklevel=2,
            )
            return None

        entries = [(r, c, v) for r, (row, _, _) in enumerate(self.rows) for c, v in row.items()]
        at_row, at_column, values = (np.array(part) for part in zip(*entries, strict=True))
        shape = (len(self.rows), self.count)
        matrix = coo_array((values, (at_row, at_column)), shape=shape).tocsr()
        bounds = np.array([(least, most) for _, least, most in self.rows])
        found = milp(
            np.array(self.costs),
            integrality=np.array(self.binary),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, bounds[:, 0], bounds[:, 1]),
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
        return np.asarray(found.x) if found.status == 0 else None


def _limits(graph: Graph, budget: Budget) -> list[tuple[Polynomial, float]] | None:
    """Polynomials and what they may reach; None where a cost is none."""
    widths = {name: variable(name) for name, tensor in graph.tensors.items() if tensor.allowed}
    found = []
    for name, target in budget.targets.items():
        cost = get_cost(name)
        most = math.floor(target) if cost.whole else target
        try:
            values = cost.terms(graph, complete_bits(graph, widths)).values()
            terms = [polynomial(value) for value in values]
        except Exception:  # whatever somebody's formula does with what is no number
            return None
        if cost.combine is sum_terms:
            found.append((sum(terms, Polynomial({})), most))
        elif cost.combine is largest_term:
            found += [(term, most) for term in terms]
        else:
            return None
    return found


def best_assignment(
    graph: Graph,
    budget: Budget,
    losses: Mapping[str, Mapping[int, float]],
    units: Mapping[str, str],
) -> dict[str, int] | None:
    """Widths of least loss that keep the budget.

    Args:
        graph: the model's layers and tensors.
        budget: what must hold; reachable.
        losses: predicted loss by unit and allowed width. A unit is what moves as one.
        units: the unit of every tensor that has a quantizer.

    Returns:
        Widths of those units that the budget counts. None where a cost is no polynomial of degree
        two or less, or the solver could not prove its widths to be the best.
    """
    limits = _limits(graph, budget)
    if limits is None:
        return None
    limits = [(p.renamed(units), most) for p, most in limits]
    counted = sorted({name for p, _ in limits for monomial in p.terms for name in monomial})
    if not counted or any(len(m) > 2 for p, _ in limits for m in p.terms):
        return None
    if not all(math.isfinite(loss) for unit in counted for loss in losses[unit].values()):
        return None  # as after a training whose loss became no number
    for margin in _MARGINS:
        widths = _solved(limits, {unit: losses[unit] for unit in counted}, margin)
        if widths is None:
            return None
        if all(_value(p, widths) <= most + 1e-12 * abs(most) for p, most in limits):
            return widths
    return None


def _value(of: Polynomial, widths: Mapping[str, int]) -> float:
    return sum(c * math.prod(widths[name] for name in m) for m, c in of.terms.items())


def _solved(
    limits: Sequence[tuple[Polynomial, float]],
    losses: Mapping[str, Mapping[int, float]],
    margin: float,
) -> dict[str, int] | None:
    """The widths that the solver finds, or None."""
    program = _Program()
    span = max(max(of.values()) - min(of.values()) for of in losses.values()) or 1.0
    chosen = {
        unit: {w: program.column(loss / span, binary=True) for w, loss in of.items()}
        for unit, of in losses.items()
    }
    for columns in chosen.values():
        program.row(dict.fromkeys(columns.values(), 1.0), 1.0, 1.0)
    products: dict[tuple[str, ...], dict[tuple[int, int], int]] = {}
    for limited, most in limits:
        entries: dict[int, float] = {}
        for monomial, coefficient in limited.terms.items():
            for column, factor in _linear(program, chosen, products, monomial).items():
                entries[column] = entries.get(column, 0.0) + coefficient * factor
        if entries:
            scale = max(most, 1e-12)
            limit = (most * (1 - margin) - limited.terms.get((), 0.0)) / scale
            program.row({c: v / scale for c, v in entries.items()}, -np.inf, limit)
    solution = program.solve()
    if solution is None:
        return None
    return {
        unit: max(columns, key=lambda width: solution[columns[width]])
        for unit, columns in chosen.items()
    }


def _linear(
    program: _Program,
    chosen: Mapping[str, Mapping[int, int]],
    products: dict[tuple[str, ...], dict[tuple[int, int], int]],
    monomial: tuple[str, ...],
) -> dict[int, float]:
    """A monomial as a sum over columns; products of two units get columns of their own."""
    if not monomial:
        return {}
    first, second = chosen[monomial[0]], chosen[monomial[-1]]
    if monomial[0] == monomial[-1]:  # a width, or its square
        return {column: float(width) ** len(monomial) for width, column in first.items()}
    if monomial not in products:
        pairs = {pair: program.column() for pair in itertools.product(first, second)}
        products[monomial] = pairs
        for place, widths in enumerate((first, second)):
            for width, column in widths.items():
                same = {c: 1.0 for pair, c in pairs.items() if pair[place] == width}
                program.row({**same, column: -1.0}, 0.0, 0.0)
    return {column: float(a * b) for (a, b), column in products[monomial].items()}
