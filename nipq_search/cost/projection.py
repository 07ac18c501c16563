"""The projection of learned bit-widths onto the allowed widths and a budget.

Guarantee: no cost exceeds its target, and the largest ratio of a cost to its target is at least
97 % of the maximum that the allowed widths can reach within the budget. If the solver in
`assignment.py` cannot determine that maximum, the guarantee is weaker: raising any single tensor
to its next allowed width would exceed the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from nipq_search.cost.assignment import GAP, Assignment
from nipq_search.cost.base import (
    Bits,
    complete_bits,
    exact_cost,
    extreme_bits,
    get_cost,
    hard_bits,
    sum_terms,
)
from nipq_search.cost.budget import Budget
from nipq_search.cost.reachable import check_reachable
from nipq_search.errors import UserError
from nipq_search.quant.graph import Graph
from nipq_search.quant.insertion.prepare import M, freeze_bits, quant_state, quantizers
from nipq_search.quant.numerics.widths import nearest_bits

MIN_USAGE = 0.97
"""Minimum share of the binding target, or of its reachable part, that a projection must use."""


def usage(graph: Graph, bits: Bits, budget: Budget) -> float:
    """Return the largest ratio of a cost to its target; above 1, the budget is exceeded.

    Args:
        graph: the model's layers and tensors.
        bits: bit-widths of the tensors that have a quantizer.
        budget: the targets.

    Returns:
        The ratio of the binding target.
    """
    return max(exact_cost(name, graph, bits) / target for name, target in budget.targets.items())


def error_scales(soft: Mapping[str, float], marginal: Mapping[str, float]) -> dict[str, float]:
    """Return the factor c of each tensor's predicted loss `c * 4**-bits`.

    The variance of the rounding error, step**2 / 12, falls by a factor of four per bit, so a
    derivative dL/db at b bits gives `c = -dL/db * 4**b / (2 ln 2)`. Estimates below a small
    positive floor, such as those that noise made negative, are raised to it. If no estimate is
    positive, all tensors are assumed to have the same loss at their current bit-widths.
    """
    raw = {n: -marginal.get(n, 0.0) * 4.0**b / (2 * math.log(2)) for n, b in soft.items()}
    positive = sorted(value for value in raw.values() if value > 0)
    if not positive:
        return {name: 4.0**b for name, b in soft.items()}
    floor = positive[len(positive) // 2] * 1e-3
    return {name: max(value, floor) for name, value in raw.items()}


def units_of(graph: Graph) -> dict[str, list[str]]:
    """Return the tensors of each unit, which share one bit-width, by the name of the first.

    A unit is a group of tensors, or a single tensor without a group; tensors with only one
    allowed width are included, tensors without a quantizer are not.
    """
    groups: dict[str, list[str]] = {}
    for name, tensor in graph.tensors.items():
        if tensor.allowed:
            groups.setdefault(tensor.group or name, []).append(name)
    return {members[0]: members for members in groups.values()}


Losses = Mapping[str, Mapping[int, float]]
"""Predicted or measured loss by unit and allowed width."""


class _Change(NamedTuple):
    """A change of a unit to its next allowed width: loss per cost or per excess, and the width."""

    rate: float
    width: int


class _Projection:
    """Projects bit-widths onto a budget.

    Runs the solver, falls back to greedy descent if the solver fails, and ends with greedy ascent.
    """

    def __init__(self, graph: Graph, budget: Budget, losses: Losses) -> None:
        self.graph, self.budget, self.losses = graph, budget, losses
        self.members = units_of(graph)
        self.allowed = {name: graph.tensors[name].allowed for name in self.members}
        self.additive = all(get_cost(name).combine is sum_terms for name in budget)
        self.partners = {name: {name} for name in self.allowed}
        self.unit = {member: name for name, members in self.members.items() for member in members}
        for layer in graph.layers:
            operands = {layer.weight, layer.input, layer.second} - {None}
            units = {self.unit[n] for n in operands if n in self.unit}
            for name in units:
                self.partners[name] |= units

    def with_width(self, bits: dict[str, int], name: str, width: int) -> dict[str, int]:
        """Return `bits` with one unit set to another width."""
        return {**bits, **dict.fromkeys(self.members[name], width)}

    def neighbor(self, bits: dict[str, int], name: str, up: bool) -> int | None:
        """Return the next larger or smaller allowed width of a unit; None if there is none."""
        allowed = self.allowed[name]
        index = allowed.index(bits[name]) + (1 if up else -1)
        return allowed[index] if 0 <= index < len(allowed) else None

    def ratios(self, bits: dict[str, int]) -> dict[str, float]:
        """Return the ratio of each budgeted cost to its target."""
        targets = self.budget.targets.items()
        return {name: exact_cost(name, self.graph, bits) / target for name, target in targets}

    def excess(self, bits: dict[str, int]) -> float:
        """Return the sum of the relative excesses over the targets: 0 within the budget.

        Individual terms above a target add to the sum. Thus lowering any of them counts as
        progress even for a cost that is the maximum of its terms.
        """
        total = 0.0
        complete = complete_bits(self.graph, bits)
        for name, target in self.budget.targets.items():
            value = exact_cost(name, self.graph, bits)
            if value > target:
                terms = get_cost(name).terms(self.graph, complete).values()
                over = sum(max(0.0, float(term) - target) for term in terms)
                total += (value - target + over) / target
        return total

    def loss_change(self, name: str, before: int, after: int) -> float:
        """Return the predicted change of the loss when a unit changes its width."""
        return self.losses[name][after] - self.losses[name][before]

    def solve(self, start: Mapping[str, int]) -> dict[str, int]:
        """Return the widths with the least loss that satisfy the guarantee of this module.

        Tensors that contribute to no budgeted cost keep their width in `start`, unless the
        guarantee requires larger ones. If the solver fails, a greedy search begins at `start`.
        """
        program = Assignment(self.graph, self.budget, self.losses, self.unit)
        bits = self.complete(start, program.min_loss())
        if (used := usage(self.graph, bits, self.budget)) >= MIN_USAGE:
            return bits
        # The widths with the least predicted loss may leave room that other widths would use.
        if (found := program.max_usage()) is None:
            return bits
        (cost, most), widths = found
        fullest = {name: widths.get(unit, start[name]) for name, unit in self.unit.items()}
        wanted = MIN_USAGE * (1 + 2 * GAP)  # `most` is optimal only up to the gap
        if used >= wanted * usage(self.graph, fullest, self.budget):
            return bits
        return self.complete(start, program.min_loss((cost, wanted * most)) or widths)

    def complete(
        self, start: Mapping[str, int], solved: Mapping[str, int] | None
    ) -> dict[str, int]:
        """Return the solution, lowered to meet the budget, then raised as long as a raise fits.

        Units without a solution start at their width in `start`. Raises that cost nothing are made
        only below `MIN_USAGE`. For solved units, `descend` only corrects the solver's rounding.
        """
        solved = solved or {}
        bits = {name: solved.get(unit, start[name]) for name, unit in self.unit.items()}
        self.descend(bits)
        self.ascend(bits, include_costless=False)
        if usage(self.graph, bits, self.budget) < MIN_USAGE:
            self.ascend(bits, include_costless=True)
        return bits

    def coupled(self, name: str) -> set[str]:
        """Return the units whose effect on a cost depends on the bit-width of `name`.

        Additive costs couple only the operands of a layer; other costs couple all units.
        """
        return self.partners[name] if self.additive else set(self.allowed)

    def descend(self, bits: dict[str, int]) -> None:
        """Lower units in place, by least loss increase per removed excess, until `excess` is 0."""
        changes: dict[str, _Change] = {}
        outdated = set(self.allowed)
        previous: set[str] = set()  # costs that exceeded their targets
        while (excess := self.excess(bits)) > 0:
            exceeded = {n for n, ratio in self.ratios(bits).items() if ratio > 1}
            if exceeded != previous:
                previous, outdated = exceeded, set(self.allowed)
            for name in outdated:
                changes.pop(name, None)
                narrower = self.neighbor(bits, name, up=False)
                if narrower is None:
                    continue
                removed = excess - self.excess(self.with_width(bits, name, narrower))
                if removed > 0:
                    loss_increase = self.loss_change(name, bits[name], narrower)
                    changes[name] = _Change(loss_increase / removed, narrower)
            if changes:
                name = min(changes, key=lambda n: (changes[n].rate, n))
                width = changes[name].width
            else:
                # Costs are rounded up, so narrowing a tiny tensor may not reduce any of them.
                # Lower the unit that stays widest instead.
                lower = {n: self.neighbor(bits, n, up=False) or 0 for n in self.allowed}
                name = max(lower, key=lambda n: (lower[n], n))
                width = lower[name]
            bits.update(self.with_width({}, name, width))
            outdated = self.coupled(name)

    def ascend(self, bits: dict[str, int], include_costless: bool) -> None:
        """Raise one unit at a time, by largest loss reduction per added cost, while one fits.

        A raise that does not fit now cannot fit later, since raises never decrease a cost.

        Args:
            bits: widths by tensor; changed in place.
            include_costless: whether to also make raises that increase no budgeted cost.
        """
        raises: dict[str, _Change] = {}
        outdated = set(self.allowed)
        while True:
            ratios = self.ratios(bits)
            for name in outdated:
                raises.pop(name, None)
                wider = self.neighbor(bits, name, up=True)
                if wider is None:
                    continue
                raised_ratios = self.ratios(self.with_width(bits, name, wider))
                added_cost = max(raised_ratios[cost] - ratios[cost] for cost in ratios)
                fits = max(raised_ratios.values()) <= 1
                if fits and (added_cost > 0 or include_costless):
                    loss_reduction = -self.loss_change(name, bits[name], wider)
                    raises[name] = _Change(loss_reduction / max(added_cost, 1e-12), wider)
            if (best := self.pop_best_raise(bits, raises)) is None:
                return
            name, width = best
            bits.update(self.with_width({}, name, width))
            outdated = self.coupled(name)

    def pop_best_raise(
        self, bits: dict[str, int], raises: dict[str, _Change]
    ) -> tuple[str, int] | None:
        """Remove and return the raise with the highest rate that still fits; None if none does.

        The rates stay valid until a coupled unit changes, but the rest of the budget may have been
        used up since they were computed. Raises that no longer fit are removed as well.

        Args:
            bits: widths by tensor.
            raises: candidate raises by unit; changed in place.

        Returns:
            The unit and its new width, in bits.
        """
        while raises:
            name = max(raises, key=lambda n: (raises[n].rate, n))
            width = raises.pop(name).width
            if usage(self.graph, self.with_width(bits, name, width), self.budget) <= 1:
                return name, width
        return None


def project(
    graph: Graph, budget: Budget, soft: Mapping[str, float], marginal: Mapping[str, float]
) -> dict[str, int]:
    """Project learned bit-widths onto the allowed widths and the budget.

    Args:
        graph: the model's layers and tensors.
        budget: the targets.
        soft: learned bit-width of every tensor that has a quantizer.
        marginal: running mean of the task loss's derivative with respect to each bit-width, in
            loss per bit.

    Returns:
        Allowed bit-widths by tensor that satisfy the guarantee of this module.

    Raises:
        UserError: the budget cannot be reached.
    """
    check_reachable(graph, budget)
    scales = error_scales(soft, marginal)
    losses = {
        unit: {w: sum(scales[m] for m in members) * 4.0**-w for w in graph.tensors[unit].allowed}
        for unit, members in units_of(graph).items()
    }
    work = _Projection(graph, budget, losses)
    return work.solve(
        {name: nearest_bits(soft[u], work.allowed[u]) for name, u in work.unit.items()}
    )


def assign(graph: Graph, budget: Budget, losses: Losses) -> dict[str, int]:
    """Return the allowed bit-widths with the least measured loss within the budget.

    Args:
        graph: the model's layers and tensors.
        budget: the targets.
        losses: measured loss by unit (see `units_of`) and allowed width.

    Returns:
        Allowed bit-widths by tensor that satisfy the guarantee of this module.

    Raises:
        UserError: the budget cannot be reached.
    """
    check_reachable(graph, budget)
    return _Projection(graph, budget, losses).solve(extreme_bits(graph, most=True))


def freeze(model: M, budget: Budget | None = None) -> M:
    """Project bit-widths onto the allowed widths and the budget and freeze them, in place.

    Afterwards, bit-widths are integer buffers and the model applies hard quantization.

    Args:
        model: a prepared model.
        budget: the targets; None rounds every bit-width to the nearest allowed one.

    Returns:
        The same model; unchanged if it is already frozen.

    Raises:
        UserError: the model is not prepared, the budget cannot be reached, or the model is already
            frozen and exceeds it.

    Example:
        >>> import nipq_search as ns
        >>> import torch
        >>> model = ns.prepare(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4))
        >>> model = ns.freeze(model, ns.Budget(bops=128))
        >>> ns.bit_config(model)
        {'weights': {'0': 4}, 'activations': {'0': 4}}
    """
    found = quantizers(model)
    graph = quant_state(model).graph
    if found and all(quantizer.bits.is_frozen for quantizer in found.values()):
        if budget is not None and usage(graph, hard_bits(model), budget) > 1:
            raise UserError("the model is already frozen, at a cost above this budget")
        return model
    if budget is None:
        return freeze_bits(model)
    soft = {name: float(q.bits.soft().detach()) for name, q in found.items()}
    marginal = {name: float(q.bits.marginal) for name, q in found.items()}
    return freeze_bits(model, project(graph, budget, soft, marginal))


def max_usage_bits(graph: Graph, budget: Budget) -> dict[str, int] | None:
    """Return the allowed bit-widths with the largest `usage` within the budget.

    Tensors on which no budgeted cost depends take their largest allowed width.

    Args:
        graph: the model's layers and tensors.
        budget: the targets, which must be reachable.

    Returns:
        Bit-widths by tensor; None if `Assignment.max_usage` returns None.
    """
    even = {unit: dict.fromkeys(graph.tensors[unit].allowed, 0.0) for unit in units_of(graph)}
    work = _Projection(graph, budget, even)
    found = Assignment(graph, budget, even, work.unit).max_usage()
    if found is None:
        return None
    most = extreme_bits(graph, most=True)
    return {name: found[1].get(unit, most[name]) for name, unit in work.unit.items()}


def is_tight(graph: Graph, bits: dict[str, int], budget: Budget) -> bool:
    """Whether bit-widths satisfy the guarantee of this module.

    Args:
        graph: the model's layers and tensors.
        bits: allowed bit-widths by tensor.
        budget: the targets.

    Returns:
        True if no target is exceeded and either at least `MIN_USAGE` of the reachable maximum is
        used or, if that maximum is unknown, no single tensor can be raised.
    """
    if (used := usage(graph, bits, budget)) > 1:
        return False
    if used >= MIN_USAGE:
        return True
    if (best := max_usage_bits(graph, budget)) is not None:
        return used >= MIN_USAGE * usage(graph, best, budget)
    work = _Projection(graph, budget, {})
    for name, allowed in work.allowed.items():
        for width in allowed:
            raised = work.with_width(bits, name, width)
            if width > bits[name] and usage(graph, raised, budget) <= 1:
                return False
    return True
