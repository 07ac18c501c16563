"""Budgets as people write them, and as absolute targets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nipq_search.cost import Budget, exact_cost
from nipq_search.cost.base import get_cost, uniform_bits
from nipq_search.cost.projection import check_reachable
from nipq_search.errors import UserError
from nipq_search.quant.graph import Graph

_UNIFORM = re.compile(r"^uniform\s+(\d+(?:\.\d+)?)$")
_PERCENT = re.compile(r"^(\d+(?:\.\d+)?)\s*%$")
REFERENCE_BITS = 8
"""Percentages are of the uniform model with this bit-width."""


@dataclass(frozen=True, kw_only=True)
class ResolvedBudget:
    """A budget of the sweep file and what it comes to.

    Attributes:
        label: as the user wrote it, `bops: uniform 4`.
        entry: the same as plain types.
        targets: absolute, by cost name.
    """

    label: str
    entry: Mapping[str, float | int | str]
    targets: Mapping[str, float]


def label_of(entry: Mapping[str, object]) -> str:
    """A budget's readable name."""
    return ", ".join(f"{cost}: {target}" for cost, target in entry.items())


def check_budget(entry: Mapping[str, float | int | str]) -> None:
    """Check the form of one budget.

    Raises:
        UserError: unknown cost or form.
    """
    if not entry:
        raise UserError("budgets: an entry is empty; write for example {bops: uniform 4}")
    for cost, target in entry.items():
        try:
            get_cost(cost)
        except UserError as error:
            raise UserError(f"budgets: {error}") from error
        _amount(cost, target)


def _amount(cost: str, target: float | int | str) -> tuple[str, float]:
    """The form (`uniform`, `percent` or `number`) and the figure of a target."""
    form, value = "number", target
    if isinstance(target, str):
        if found := _UNIFORM.match(target.strip()):
            form, value = "uniform", float(found[1])
        elif found := _PERCENT.match(target.strip()):
            form, value = "percent", float(found[1])
        else:
            try:
                value = float(target.replace("_", ""))
            except ValueError:
                raise UserError(
                    f"budgets.{cost}: {target!r} is no budget; write `uniform 4`, a number, "
                    f'or "25 %" of the uniform {REFERENCE_BITS}-bit model\'s'
                ) from None
    number = float(value)
    if isinstance(target, bool) or not 0 < number < float("inf"):
        raise UserError(f"budgets.{cost}: {target!r} is not above 0")
    if form == "uniform" and not 1 <= number <= 16:
        raise UserError(f"budgets.{cost}: {target!r}: use 1 to 16 bits")
    return form, number


def resolve(entry: Mapping[str, float | int | str], graph: Graph) -> ResolvedBudget:
    """Absolute targets of a budget for a model.

    Args:
        entry: cost name to `uniform K` (the cost formula at K bits everywhere but in pinned
            layers; fractions too), a number, or a percentage of the uniform 8-bit model's.
        graph: the model's layers and tensors.

    Raises:
        UserError: the budget is below the least reachable cost.
    """
    targets = {}
    for cost, target in entry.items():
        form, number = _amount(cost, target)
        if form == "uniform":
            number = exact_cost(cost, graph, uniform_bits(graph, number))
        elif form == "percent":
            number *= exact_cost(cost, graph, uniform_bits(graph, REFERENCE_BITS)) / 100
        targets[cost] = number
    try:
        check_reachable(graph, Budget(**targets))
    except UserError as error:
        raise UserError(f"budgets: {{{label_of(entry)}}}: {error}") from error
    return ResolvedBudget(label=label_of(entry), entry=dict(entry), targets=targets)
