"""From learned bit-widths to allowed ones that keep a budget and use it up.

The promise: no cost above its target, and afterwards at least 97 % is used of what allowed widths
can use of the target that binds. Where the solver cannot tell how much that is, no single tensor
can be given its next allowed width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

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
from nipq_search.errors import UserError
from nipq_search.quant.graph import Graph
from nipq_search.quant.insertion.prepare import M, freeze_bits, quant_state, quantizers
from nipq_search.quant.numerics.widths import nearest_bits

FULL = 0.97
"""Share of a target, or of what can be used of it, from which on it counts as used up."""


def usage(graph: Graph, bits: Bits, budget: Budget) -> float:
    """The largest ratio of a cost to its target: above 1 the budget is broken."""
    return max(exact_cost(name, graph, bits) / target for name, target in budget.targets.items())


def largest_terms(name: str, graph: Graph) -> str:
    """The layers or tensors that set a cost at its least, in words: `a: 50 %, b: 20 %`."""
    terms = get_cost(name).terms(graph, complete_bits(graph, extreme_bits(graph, most=False)))
    total = sum(float(term) for term in terms.values()) or 1.0
    largest = sorted(terms.items(), key=lambda item: -float(item[1]))[:3]
    return ", ".join(f"{layer}: {100 * float(v) / total:.0f} %" for layer, v in largest)


def check_reachable(graph: Graph, budget: Budget) -> None:
    """Check that some allowed bit-widths keep the budget.

    Raises:
        UserError: a target is below the least reachable cost; names the layers that set it.
    """
    bits = extreme_bits(graph, most=False)
    for name, target in budget.targets.items():
        least = exact_cost(name, graph, bits)
        if least <= target:
            continue
        raise UserError(
            f"{name}: the target {target:,.10g} is below the least reachable cost {least:,.10g} "
            f"(set by {largest_terms(name, graph)}); raise it, allow fewer bits, or unpin layers"
        )


def error_scales(soft: Mapping[str, float], marginal: Mapping[str, float]) -> dict[str, float]:
    """The factor c of each tensor's predicted loss `c * 4**-bits`.

    Rounding error falls by four with every bit (its variance is step**2 / 12), so a marginal
    loss dL/db at b bits gives `c = -dL/db * 4**b / (2 ln 2)`. Where noise made the estimate
    negative, a small positive value stands in; where nothing was measured all tensors gain alike.
    """
    raw = {n: -marginal.get(n, 0.0) * 4.0**b / (2 * math.log(2)) for n, b in soft.items()}
    positive = sorted(value for value in raw.values() if value > 0)
    if not positive:
        return {name: 4.0**b for name, b in soft.items()}
    floor = positive[len(positive) // 2] * 1e-3
    return {name: max(value, floor) for name, value in raw.items()}


def units_of(graph: Graph) -> dict[str, list[str]]:
    """What moves as one: the members of each group, and every other tensor by itself.

    Keys are the first members; tensors without a choice are units too.
    """
    groups: dict[str, list[str]] = {}
    for name, tensor in graph.tensors.items():
        if tensor.allowed:
            groups.setdefault(tensor.group or name, []).append(name)
    return {members[0]: members for members in groups.values()}


Losses = Mapping[str, Mapping[int, float]]
"""Predicted loss by unit and allowed width."""


class _Projection:
    """The solver's bit-widths, or greedy descent and ascent; then raises until nothing fits."""

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

    def moved(self, bits: dict[str, int], name: str, width: int) -> dict[str, int]:
        """`bits` with a tensor, and the rest of its group, at another width."""
        return {**bits, **dict.fromkeys(self.members[name], width)}

    def neighbour(self, bits: dict[str, int], name: str, up: bool) -> int | None:
        """The next allowed width of a tensor, or None at the end of its set."""
        allowed = self.allowed[name]
        index = allowed.index(bits[name]) + (1 if up else -1)
        return allowed[index] if 0 <= index < len(allowed) else None

    def ratios(self, bits: dict[str, int]) -> dict[str, float]:
        """Every budgeted cost over its target."""
        targets = self.budget.targets.items()
        return {name: exact_cost(name, self.graph, bits) / target for name, target in targets}

    def excess(self, bits: dict[str, int]) -> float:
        """By how much the budget is broken, in shares of the targets; 0 if it holds.

        Terms that exceed a target by themselves add to it, so that a cost which is the largest
        of several terms gets nearer with each of them.
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
        """Predicted change of the loss."""
        return self.losses[name][after] - self.losses[name][before]

    def found(self, start: Mapping[str, int]) -> dict[str, int]:
        """The best widths that keep the promise; `start` where no budgeted cost counts a tensor.

        Where the solver proves nothing, they are searched from `start`.
        """
        program = Assignment(self.graph, self.budget, self.losses, self.unit)
        bits = self.mended(start, program.best())
        if (used := usage(self.graph, bits, self.budget)) >= FULL:
            return bits
        # What is best by predicted loss may leave room that coarse widths could use.
        if (found := program.fullest()) is None:
            return bits
        (cost, most), widths = found
        fullest = {name: widths.get(unit, start[name]) for name, unit in self.unit.items()}
        wanted = FULL * (1 + 2 * GAP)  # `most` is proven up to the solver's gap
        if used >= wanted * usage(self.graph, fullest, self.budget):
            return bits
        return self.mended(start, program.best((cost, wanted * most)) or widths)

    def mended(self, start: Mapping[str, int], solved: Mapping[str, int] | None) -> dict[str, int]:
        """`start` with what was solved, brought within the budget and raised while anything fits.

        Of what was solved `descend` corrects no more than the solver's rounding.
        """
        solved = solved or {}
        bits = {name: solved.get(unit, start[name]) for name, unit in self.unit.items()}
        self.descend(bits)
        self.ascend(bits, free=False)
        if usage(self.graph, bits, self.budget) < FULL:
            self.ascend(bits, free=True)
        return bits

    def touched(self, name: str) -> set[str]:
        """Tensors whose effect on a cost changes when the bit-width of `name` does.

        Additive costs multiply only the operands of a layer; any other cost couples everything.
        """
        return self.partners[name] if self.additive else set(self.allowed)

    def descend(self, bits: dict[str, int]) -> None:
        """Lower the tensor that loses least per unit of excess cost, until the budget holds."""
        rates: dict[str, tuple[float, int]] = {}
        stale = set(self.allowed)
        broken: set[str] = set()
        while (now := self.excess(bits)) > 0:
            if broken != (still := {n for n, ratio in self.ratios(bits).items() if ratio > 1}):
                broken, stale = still, set(self.allowed)
            for name in stale:
                rates.pop(name, None)
                after = self.neighbour(bits, name, up=False)
                if after is None:
                    continue
                saved = now - self.excess(self.moved(bits, name, after))
                if saved > 0:
                    rates[name] = (self.loss_change(name, bits[name], after) / saved, after)
            if rates:
                name = min(rates, key=lambda n: (rates[n][0], n))
                after = rates[name][1]
            else:
                # Rounding up to whole units hides the saving of tiny tensors: lower the widest.
                lower = {n: self.neighbour(bits, n, up=False) or 0 for n in self.allowed}
                name = max(lower, key=lambda n: (lower[n], n))
                after = lower[name]
            bits.update(self.moved({}, name, after))
            stale = self.touched(name)

    def ascend(self, bits: dict[str, int], free: bool) -> None:
        """Raise the tensor that gains most per unit of cost, while one fits.

        With `free` unset, tensors that no budgeted cost counts stay where they were learned. A
        raise that does not fit never fits later, for costs only grow here.
        """
        rates: dict[str, tuple[float, int]] = {}
        stale = set(self.allowed)
        while True:
            now = self.ratios(bits)
            for name in stale:
                rates.pop(name, None)
                after = self.neighbour(bits, name, up=True)
                if after is None:
                    continue
                then = self.ratios(self.moved(bits, name, after))
                paid = max(then[cost] - now[cost] for cost in now)
                if max(then.values()) <= 1 and (paid > 0 or free):
                    gain = -self.loss_change(name, bits[name], after)
                    rates[name] = (gain / max(paid, 1e-12), after)
            while rates:
                name = max(rates, key=lambda n: (rates[n][0], n))
                after = rates.pop(name)[1]
                if usage(self.graph, self.moved(bits, name, after), self.budget) <= 1:
                    break
            else:
                return
            bits.update(self.moved({}, name, after))
            stale = self.touched(name)


def project(
    graph: Graph, budget: Budget, soft: Mapping[str, float], marginal: Mapping[str, float]
) -> dict[str, int]:
    """Allowed bit-widths near the learned ones that keep the promise of this module.

    Args:
        graph: the model's layers and tensors.
        budget: what must hold.
        soft: learned bit-width of every tensor that has a quantizer.
        marginal: running mean of the task loss's derivative by bit-width, same keys.

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
    return work.found(
        {name: nearest_bits(soft[u], work.allowed[u]) for name, u in work.unit.items()}
    )


def assign(graph: Graph, budget: Budget, losses: Losses) -> dict[str, int]:
    """Allowed bit-widths of least measured loss that keep the promise of this module.

    Args:
        graph: the model's layers and tensors.
        budget: what must hold.
        losses: by unit (see `units_of`) and allowed width.

    Raises:
        UserError: the budget cannot be reached.
    """
    check_reachable(graph, budget)
    return _Projection(graph, budget, losses).found(extreme_bits(graph, most=True))


def freeze(model: M, budget: Budget | None = None) -> M:
    """Project bit-widths onto the allowed sets and the budget and fix them, in place.

    Afterwards bit-widths are integer buffers and the model computes hard quantization.

    Args:
        model: a prepared model.
        budget: what must hold; None takes the nearest allowed width of every tensor.

    Raises:
        UserError: the budget cannot be reached, or the model is frozen and breaks it.
    """
    found = quantizers(model)
    graph = quant_state(model).graph
    if found and all(quantizer.bits.is_frozen for quantizer in found.values()):
        if budget is not None and usage(graph, hard_bits(model), budget) > 1:
            raise UserError("the model is frozen already, at a cost above this budget")
        return model
    if budget is None:
        return freeze_bits(model)
    soft = {name: float(q.bits.soft().detach()) for name, q in found.items()}
    marginal = {name: float(q.bits.marginal) for name, q in found.items()}
    return freeze_bits(model, project(graph, budget, soft, marginal))


def fullest(graph: Graph, budget: Budget) -> dict[str, int] | None:
    """Allowed bit-widths that use up as much as can be of the target that binds.

    None where the solver cannot tell. Tensors that the budget does not count get their most.

    Args:
        graph: the model's layers and tensors.
        budget: what must hold; reachable.
    """
    even = {unit: dict.fromkeys(graph.tensors[unit].allowed, 0.0) for unit in units_of(graph)}
    work = _Projection(graph, budget, even)
    found = Assignment(graph, budget, even, work.unit).fullest()
    if found is None:
        return None
    most = extreme_bits(graph, most=True)
    return {name: found[1].get(unit, most[name]) for name, unit in work.unit.items()}


def is_tight(graph: Graph, bits: dict[str, int], budget: Budget) -> bool:
    """Whether bit-widths keep the promise: within the budget, and used up as far as possible."""
    if (used := usage(graph, bits, budget)) > 1:
        return False
    if used >= FULL:
        return True
    if (best := fullest(graph, budget)) is not None:
        return used >= FULL * usage(graph, best, budget)
    work = _Projection(graph, budget, {})
    for name, allowed in work.allowed.items():
        for width in allowed:
            raised = work.moved(bits, name, width)
            if width > bits[name] and usage(graph, raised, budget) <= 1:
                return False
    return True
