"""Costs as polynomials of bit-widths, so that a solver can be given them.

A cost's formula is written for numbers and tensors; given these in their place, it returns its
terms with what they hang on. A formula that does more than add and multiply raises `TypeError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Monomial = tuple[str, ...]
"""Names that are multiplied, in ascending order; none for a constant."""


class Polynomial:
    """A sum of monomials with coefficients; zero coefficients may stand in it."""

    def __init__(self, terms: Mapping[Monomial, float]) -> None:
        """Take the coefficients."""
        self.terms = dict(terms)

    def __add__(self, other: Any) -> Polynomial:
        """Sum with a number or a polynomial."""
        total = dict(self.terms)
        for monomial, coefficient in polynomial(other).terms.items():
            total[monomial] = total.get(monomial, 0.0) + coefficient
        return Polynomial(total)

    def __mul__(self, other: Any) -> Polynomial:
        """Product with a number or a polynomial."""
        product: dict[Monomial, float] = {}
        for a, x in self.terms.items():
            for b, y in polynomial(other).terms.items():
                monomial = tuple(sorted(a + b))
                product[monomial] = product.get(monomial, 0.0) + x * y
        return Polynomial(product)

    def __neg__(self) -> Polynomial:
        """The same with every sign changed."""
        return self * -1.0

    def __sub__(self, other: Any) -> Polynomial:
        """Difference from a number or a polynomial."""
        return self + -polynomial(other)

    def __rsub__(self, other: Any) -> Polynomial:
        """Difference from a number."""
        return polynomial(other) - self

    def __truediv__(self, other: Any) -> Polynomial:
        """Quotient by a number."""
        if isinstance(other, Polynomial):
            raise TypeError("a polynomial divides by numbers only")
        return self * (1.0 / float(other))

    def __eq__(self, other: object) -> bool:
        """A formula that compares is no polynomial."""
        raise TypeError("polynomials are not compared")

    def __bool__(self) -> bool:
        """As for comparisons."""
        raise TypeError("a polynomial is neither true nor false")

    __hash__ = None  # type: ignore[assignment]
    __radd__ = __add__
    __rmul__ = __mul__

    def renamed(self, names: Mapping[str, str]) -> Polynomial:
        """With other names, of which several may become one."""
        total: dict[Monomial, float] = {}
        for monomial, coefficient in self.terms.items():
            new = tuple(sorted(names[name] for name in monomial))
            total[new] = total.get(new, 0.0) + coefficient
        return Polynomial(total)


def polynomial(value: Any) -> Polynomial:
    """A number as a polynomial, or the polynomial that it is.

    Raises:
        TypeError: it is neither.
    """
    return value if isinstance(value, Polynomial) else Polynomial({(): float(value)})


def variable(name: str) -> Polynomial:
    """The polynomial that is one bit-width."""
    return Polynomial({(name,): 1.0})
