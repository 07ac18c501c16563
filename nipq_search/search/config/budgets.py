"""Budgets as written in a sweep file, and their absolute targets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from nipq_search.cost import Budget, exact_cost
from nipq_search.cost.base import get_cost, uniform_bits
from nipq_search.cost.reachable import check_reachable
from nipq_search.errors import UserError
from nipq_search.quant.graph import Graph

BudgetEntry = dict[str, float | int | str]
"""A budget in a sweep file: target by cost name, such as `{"bops": "uniform 4"}`."""

_UNIFORM = re.compile(r"^uniform\s+(\d+(?:\.\d+)?)$")
_PERCENT = re.compile(r"^(\d+(?:\.\d+)?)\s*%$")
REFERENCE_BITS = 8
"""Bit-width of the uniform model that percentages refer to."""


class _TargetForm(Enum):
    """Notation of a target in the sweep file."""

    UNIFORM = "uniform"
    PERCENT = "percent"
    NUMBER = "number"


@dataclass(frozen=True, kw_only=True)
class ResolvedBudget:
    """A budget of the sweep file with its absolute targets.

    Attributes:
        label: the budget as the user wrote it, such as `bops: uniform 4`.
        entry: the budget's entry in the sweep file.
        targets: absolute target by cost name.
    """

    label: str
    entry: Mapping[str, float | int | str]
    targets: Mapping[str, float]


def budget_label(entry: Mapping[str, object]) -> str:
    """Return a readable name for a budget, such as `bops: uniform 4`."""
    return ", ".join(f"{cost}: {target}" for cost, target in entry.items())


def check_budget(entry: Mapping[str, float | int | str]) -> None:
    """Check the notation of one budget, without computing its targets.

    Raises:
        UserError: the budget is empty, a cost is unknown, or a target is malformed or not allowed.
    """
    if not entry:
        raise UserError("budgets: an entry is empty; write, for example, {bops: uniform 4}")
    for cost, target in entry.items():
        try:
            get_cost(cost)
        except UserError as error:
            raise UserError(f"budgets: {error}") from error
        _parse_target(cost, target)


def _parse_target(cost: str, target: float | int | str) -> tuple[_TargetForm, float]:
    """Return the notation of a target, and the number in it.

    Raises:
        UserError: the target is malformed or not allowed.
    """
    form, value = _TargetForm.NUMBER, target
    if isinstance(target, str):
        if found := _UNIFORM.match(target.strip()):
            form, value = _TargetForm.UNIFORM, float(found[1])
        elif found := _PERCENT.match(target.strip()):
            form, value = _TargetForm.PERCENT, float(found[1])
        else:
            try:
                value = float(target.replace("_", ""))
            except ValueError:
                raise UserError(
                    f"budgets.{cost}: {target!r} is not a budget; write `uniform 4`, a number, "
                    f'or "25 %" (of the cost of the uniform {REFERENCE_BITS}-bit model)'
                ) from None
    number = float(value)
    if isinstance(target, bool) or not 0 < number < float("inf"):
        raise UserError(f"budgets.{cost}: {target!r} is not allowed; use a number above 0")
    if form is _TargetForm.UNIFORM and not 1 <= number <= 16:
        raise UserError(f"budgets.{cost}: {target!r}: use 1 to 16 bits")
    return form, number


def resolve_budget(entry: Mapping[str, float | int | str], graph: Graph) -> ResolvedBudget:
    """Compute the absolute targets of a budget for a model.

    Args:
        entry: target by cost name: `uniform K` (the cost at K bits in all layers that are not
            pinned; K may be fractional), a number, or a percentage of the cost of the uniform
            8-bit model.
        graph: the model's layers and tensors.

    Returns:
        The budget with its targets and its label.

    Raises:
        UserError: a target is malformed, or the budget is below the least reachable cost.
    """
    targets = {}
    for cost, target in entry.items():
        form, number = _parse_target(cost, target)
        if form is _TargetForm.UNIFORM:
            number = exact_cost(cost, graph, uniform_bits(graph, number))
        elif form is _TargetForm.PERCENT:
            number *= exact_cost(cost, graph, uniform_bits(graph, REFERENCE_BITS)) / 100
        targets[cost] = number
    label = budget_label(entry)
    try:
        check_reachable(graph, Budget(**targets))
    except UserError as error:
        raise UserError(f"budgets: {{{label}}}: {error}") from error
    return ResolvedBudget(label=label, entry=dict(entry), targets=targets)
