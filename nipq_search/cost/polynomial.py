"""Costs as polynomials in the bit-widths, for the solver.

Cost formulas are written for numbers and tensors. Called with polynomials instead, a formula
returns its terms symbolically. Operations other than addition, subtraction, multiplication and
division by a number raise `TypeError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Monomial = tuple[str, ...]
"""Names of the factors in ascending order; empty for a constant."""


class Polynomial:
    """A sum of monomials, each with a coefficient, which may be zero."""

    def __init__(self, terms: Mapping[Monomial, float]) -> None:
        """Copy the terms, which map each monomial to its coefficient."""
        self.terms = dict(terms)

    def __add__(self, other: Any) -> Polynomial:
        """Add a number or a polynomial."""
        total = dict(self.terms)
        for monomial, coefficient in polynomial(other).terms.items():
            total[monomial] = total.get(monomial, 0.0) + coefficient
        return Polynomial(total)

    def __mul__(self, other: Any) -> Polynomial:
        """Multiply by a number or a polynomial."""
        product: dict[Monomial, float] = {}
        for a, x in self.terms.items():
            for b, y in polynomial(other).terms.items():
                monomial = tuple(sorted(a + b))
                product[monomial] = product.get(monomial, 0.0) + x * y
        return Polynomial(product)

    def __neg__(self) -> Polynomial:
        """Negate every coefficient."""
        return self * -1.0

    def __sub__(self, other: Any) -> Polynomial:
        """Subtract a number or a polynomial."""
        return self + -polynomial(other)

    def __rsub__(self, other: Any) -> Polynomial:
        """Subtract from a number."""
        return polynomial(other) - self

    def __truediv__(self, other: Any) -> Polynomial:
        """Divide by a number."""
        if isinstance(other, Polynomial):
            raise TypeError("a polynomial can be divided only by a number")
        return self * (1.0 / float(other))

    def __eq__(self, other: object) -> bool:
        """Reject comparisons: a formula that compares is not a polynomial."""
        raise TypeError("polynomials cannot be compared")

    def __bool__(self) -> bool:
        """Reject truth tests, for the same reason as comparisons."""
        raise TypeError("a polynomial has no truth value")

    __hash__ = None  # type: ignore[assignment]
    __radd__ = __add__
    __rmul__ = __mul__

    def renamed(self, names: Mapping[str, str]) -> Polynomial:
        """Return the polynomial with renamed variables; several may receive the same new name."""
        total: dict[Monomial, float] = {}
        for monomial, coefficient in self.terms.items():
            new = tuple(sorted(names[name] for name in monomial))
            total[new] = total.get(new, 0.0) + coefficient
        return Polynomial(total)


def polynomial(value: Any) -> Polynomial:
    """Convert a number to a constant polynomial; return a polynomial unchanged.

    Raises:
        TypeError: `value` is neither a number nor a polynomial.
    """
    return value if isinstance(value, Polynomial) else Polynomial({(): float(value)})


def variable(name: str) -> Polynomial:
    """Return the polynomial that consists of a single variable, a bit-width."""
    return Polynomial({(name,): 1.0})
