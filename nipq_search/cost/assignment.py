"""Bit-widths with the least predicted loss within a budget, from a mixed-integer program.

Each tensor, or group of tensors, takes one of its allowed widths, with a binary variable per
width. A product of two widths, as in BOPs, is linearized: each pair of widths has a variable, and
the sum of these variables over either width is the binary variable of the other width. The
program is solved by HiGHS, which scipy provides.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from nipq_search.cost.base import complete_bits, get_cost, largest_term, sum_terms
from nipq_search.cost.budget import Budget
from nipq_search.cost.polynomial import Polynomial, polynomial, variable
from nipq_search.quant.graph import Graph

NODES = 2000
"""Limit on branch-and-bound nodes; a time limit would make results depend on the machine."""

GAP = 1e-4
"""Relative optimality gap at which the solver stops."""

_LOSS_DIGITS = 10
"""Decimal places to which the solver's losses are rounded.

Further digits depend on the order of floating-point sums, and could make the solver return a
different assignment within its gap.
"""

_MARGINS = (0.0, 2e-6)
"""Relative safety margins, tried in order: the solver meets budgets only up to rounding."""


Limit = tuple[Polynomial, float]
"""A cost, or one term of a cost that is a maximum, and a bound: an upper one unless noted."""


class _Program:
    """A mixed-integer program, built column by column and row by row."""

    def __init__(self) -> None:
        self.count = 0
        self.costs: list[float] = []
        self.binary: list[int] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []

    def column(self, cost: float = 0.0, binary: bool = False) -> int:
        """Add a variable in [0, 1] and return its index."""
        self.costs.append(cost)
        self.binary.append(int(binary))
        self.count += 1
        return self.count - 1

    def row(self, entries: Mapping[int, float], least: float, most: float) -> None:
        """Bound a linear combination of variables.

        Args:
            entries: coefficient by variable index.
            least: lower bound.
            most: upper bound.
        """
        self.rows.append((dict(entries), least, most))

    def solve(self) -> np.ndarray | None:
        """Return the optimum as an array of all variables, up to the relative gap `GAP`.

        Returns:
            None if scipy is missing (with a warning) or optimality is not proven.
        """
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import
            from scipy.sparse import coo_array
        except ImportError:
            warnings.warn(
                "scipy is missing: bit-widths are projected by a greedy search, which may miss "
                "better assignments; install it with `pip install scipy`",
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


Share = Callable[[float], float]
"""Function from the value of a cost to the share of its target that it uses."""


def _share(value: float, target: float, whole: bool) -> float:
    """Return `value / target`; the value of a cost with `whole` is rounded up first."""
    return (math.ceil(value * (1 - 1e-12)) if whole else value) / target


def _limits(graph: Graph, budget: Budget) -> list[tuple[Limit, Share]] | None:
    """Return each cost as a polynomial, with its upper bound and its `Share` function.

    A cost that is the maximum of its terms has one entry per term.

    Returns:
        None if a cost is not a polynomial, or combines its terms in a custom way.
    """
    widths = {name: variable(name) for name, tensor in graph.tensors.items() if tensor.allowed}
    found: list[tuple[Limit, Share]] = []
    for name, target in budget.targets.items():
        cost = get_cost(name)
        most = math.floor(target) if cost.whole else target
        share = partial(_share, target=target, whole=cost.whole)
        try:
            values = cost.terms(graph, complete_bits(graph, widths)).values()
            terms = [polynomial(value) for value in values]
        except Exception:  # a custom formula may raise anything when called with non-numbers
            return None
        if cost.combine is sum_terms:
            found.append(((sum(terms, Polynomial({})), most), share))
        elif cost.combine is largest_term:
            found += [((term, most), share) for term in terms]
        else:
            return None
    return found


class Assignment:
    """Chooses bit-widths for a graph under a budget by mixed-integer programming.

    Args:
        graph: the model's layers and tensors.
        budget: the targets, which must be reachable.
        losses: predicted loss by unit and allowed width; the tensors of a unit share one width.
        units: unit of every tensor that has a quantizer, by tensor name.
    """

    def __init__(
        self,
        graph: Graph,
        budget: Budget,
        losses: Mapping[str, Mapping[int, float]],
        units: Mapping[str, str],
    ) -> None:
        """Express the budget's costs as polynomials in the widths of the units."""
        limits = _limits(graph, budget) or []
        self._limits: list[Limit] = [(p.renamed(units), most) for (p, most), _ in limits]
        self._shares = [share for _, share in limits]
        counted = {name for p, _ in self._limits for monomial in p.terms for name in monomial}
        self._losses = {unit: losses[unit] for unit in sorted(counted)}
        self._solvable = bool(counted) and all(
            len(m) <= 2 for p, _ in self._limits for m in p.terms
        )

    def min_loss(self, at_least: Limit | None = None) -> dict[str, int] | None:
        """Return the widths with the least loss within the budget.

        Args:
            at_least: a cost and the minimum value that it must reach.

        Returns:
            Widths of the units on which a budgeted cost depends. None if there are none, a cost is
            not a polynomial of degree two or less, a loss is not finite, or the solver found no
            provably optimal widths within the budget.
        """
        if not all(math.isfinite(loss) for row in self._losses.values() for loss in row.values()):
            return None  # for example after training with a NaN loss
        return self._solve(at_least)

    def max_usage(self) -> tuple[Limit, dict[str, int]] | None:
        """Maximize the largest ratio of a cost to its target within the budget.

        Returns:
            The cost that reaches the largest ratio, with its value, and widths that reach it. None
            if no budgeted cost depends on a width, a cost is not a polynomial of degree two or
            less, or the solver found no provably optimal widths within the budget.
        """
        best: tuple[float, Limit, dict[str, int]] | None = None
        bounded = [
            (share(self._bound(*limit) * limit[1]), limit, share)
            for limit, share in zip(self._limits, self._shares, strict=True)
            if limit[1] > 0
        ]
        for bound, (cost, _), share in sorted(bounded, key=lambda entry: -entry[0]):
            if best is not None and best[0] >= bound:
                break
            widths = self._solve(maximize=cost)
            if widths is None:
                return None
            value = _value(cost, widths)
            if best is None or share(value) > best[0]:
                best = share(value), (cost, value), widths
        return None if best is None else best[1:]

    def _bound(self, cost: Polynomial, most: float) -> float:
        """Return an upper bound on the ratio of a cost to its target within the budget."""
        units = {name for monomial in cost.terms for name in monomial}
        if len(units) == 1:
            (unit,) = units
            values = [_value(cost, {unit: width}) for width in self._losses[unit]]
            return max((v for v in values if v <= most), default=0.0) / most
        if any(coefficient < 0 for coefficient in cost.terms.values()):
            return 1.0
        return min(1.0, _value(cost, {unit: max(self._losses[unit]) for unit in units}) / most)

    def _solve(
        self, at_least: Limit | None = None, maximize: Polynomial | None = None
    ) -> dict[str, int] | None:
        """Solve with increasing safety margins until the exact costs are within the budget.

        Returns:
            The widths by unit, or None if no attempt succeeds; see `_solved`.
        """
        if not self._solvable:
            return None
        for margin in _MARGINS:
            widths = _solved(self._limits, self._losses, margin, at_least, maximize)
            if widths is None:
                return None
            if all(_value(p, widths) <= most + 1e-12 * abs(most) for p, most in self._limits):
                return widths
        return None


def _value(cost: Polynomial, widths: Mapping[str, int]) -> float:
    """Evaluate a cost at the given widths."""
    return sum(c * math.prod(widths[name] for name in m) for m, c in cost.terms.items())


def _solved(
    limits: Sequence[Limit],
    losses: Mapping[str, Mapping[int, float]],
    margin: float,
    at_least: Limit | None,
    maximize: Polynomial | None,
) -> dict[str, int] | None:
    """Return the widths that minimize the loss, or maximize a cost; None if not proven optimal."""
    program = _Program()
    span = max(max(row.values()) - min(row.values()) for row in losses.values()) or 1.0
    chosen = {
        unit: {
            w: program.column(
                round(loss / span, _LOSS_DIGITS) if maximize is None else 0.0, binary=True
            )
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
            if limited is maximize:
                for column, value in entries.items():
                    program.costs[column] -= value / scale
    if at_least is not None:
        cost, least = at_least
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
    """Return a monomial as coefficients by column; add columns for a new product of two units."""
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
