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


Limit = tuple[Polynomial, float]
"""A cost, or one of the terms of which a cost is the largest, and what it may reach."""


class Assignment:
    """The widths of a graph under a budget, as programs.

    Args:
        graph: the model's layers and tensors.
        budget: what must hold; reachable.
        losses: predicted loss by unit and allowed width. A unit is what moves as one.
        units: the unit of every tensor that has a quantizer.
    """

    def __init__(
        self,
        graph: Graph,
        budget: Budget,
        losses: Mapping[str, Mapping[int, float]],
        units: Mapping[str, str],
    ) -> None:
        """Write the budget's costs as polynomials of the units' widths."""
        limits = _limits(graph, budget) or []
        self._limits: list[Limit] = [(p.renamed(units), most) for p, most in limits]
        counted = {name for p, _ in self._limits for monomial in p.terms for name in monomial}
        self._losses = {unit: losses[unit] for unit in sorted(counted)}
        self._can = bool(counted) and all(len(m) <= 2 for p, _ in self._limits for m in p.terms)

    def best(self, full: Limit | None = None) -> dict[str, int] | None:
        """Widths of least loss that keep the budget.

        Args:
            full: a cost, and how much of it is to be used at least.

        Returns:
            Widths of those units that the budget counts. None where a cost is no polynomial of
            degree two or less, or the solver could not prove its widths to be the best.
        """
        if not all(math.isfinite(loss) for of in self._losses.values() for loss in of.values()):
            return None  # as after a training whose loss became no number
        return self._found(self._losses, full)

    def fullest(self) -> tuple[Limit, dict[str, int]] | None:
        """The cost that can come nearest to its target, how far, and widths that bring it there.

        None where that cannot be told; see `best`.
        """
        found: tuple[float, Limit, dict[str, int]] | None = None
        bounded = [(self._bound(*limit), limit) for limit in self._limits if limit[1] > 0]
        for bound, (cost, most) in sorted(bounded, key=lambda entry: -entry[0]):
            if found is not None and found[0] >= bound:
                break
            widths = self._found(self._losses, full=None, of=cost)
            if widths is None:
                return None
            value = _value(cost, widths)
            if found is None or value / most > found[0]:
                found = value / most, (cost, value), widths
        return None if found is None else found[1:]

    def _bound(self, cost: Polynomial, most: float) -> float:
        """A ratio of a cost to its target that it cannot exceed."""
        units = {name for monomial in cost.terms for name in monomial}
        if len(units) == 1:
            (unit,) = units
            values = [_value(cost, {unit: width}) for width in self._losses[unit]]
            return max((v for v in values if v <= most), default=0.0) / most
        if any(coefficient < 0 for coefficient in cost.terms.values()):
            return 1.0
        return min(1.0, _value(cost, {unit: max(self._losses[unit]) for unit in units}) / most)

    def _found(
        self,
        losses: Mapping[str, Mapping[int, float]],
        full: Limit | None,
        of: Polynomial | None = None,
    ) -> dict[str, int] | None:
        if not self._can:
            return None
        for margin in _MARGINS:
            widths = _solved(self._limits, losses, margin, full, of)
            if widths is None:
                return None
            if all(_value(p, widths) <= most + 1e-12 * abs(most) for p, most in self._limits):
                return widths
        return None


def _value(of: Polynomial, widths: Mapping[str, int]) -> float:
    return sum(c * math.prod(widths[name] for name in m) for m, c in of.terms.items())


def _solved(
    limits: Sequence[Limit],
    losses: Mapping[str, Mapping[int, float]],
    margin: float,
    full: Limit | None,
    of: Polynomial | None,
) -> dict[str, int] | None:
    """The widths that the solver finds, or None: of least loss, or the most of the cost `of`."""
    program = _Program()
    span = max(max(of.values()) - min(of.values()) for of in losses.values()) or 1.0
    chosen = {
        unit: {
            w: program.column(loss / span if of is None else 0.0, binary=True)
            for w, loss in own.items()
        }
        for unit, own in losses.items()
    }
    for columns in chosen.values():
        program.row(dict.fromkeys(columns.values(), 1.0), 1.0, 1.0)
    products: dict[tuple[str, ...], dict[tuple[int, int], int]] = {}

    def linear(cost: Polynomial) -> dict[int, float]:
        entries: dict[int, float] = {}
        for monomial, coefficient in cost.terms.items():
            for column, factor in _linear(program, chosen, products, monomial).items():
                entries[column] = entries.get(column, 0.0) + coefficient * factor
        return entries

    for limited, most in limits:
        if entries := linear(limited):
            scale = max(most, 1e-12)
            limit = (most * (1 - margin) - limited.terms.get((), 0.0)) / scale
            program.row({c: v / scale for c, v in entries.items()}, -np.inf, limit)
            if of is limited:
                for column, value in entries.items():
                    program.costs[column] -= value / scale
    if full is not None:
        cost, least = full
        scale = max(least, 1e-12)
        rest = (least - cost.terms.get((), 0.0)) / scale
        program.row({c: v / scale for c, v in linear(cost).items()}, rest, np.inf)
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
