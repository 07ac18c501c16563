"""Where the next trial adds most to a front, as pure functions of its points."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SAME = 0.05
"""Octaves of cost within which two trials count as being at the same place."""

REPEAT = (0.2, 0.003)
"""What a second trial at a place is expected to gain: a share of what the float model is ahead,
and one of the span of the metric. Each further one is expected to gain half as much."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """How the front is measured; metrics are the greater the better.

    Attributes:
        cost: name of the front's cost.
        least: least reachable cost.
        most: the uniform 8-bit model's cost.
        reference: metric from which on a point counts.
        best: the float model's metric.
    """

    cost: str
    least: float
    most: float
    reference: float
    best: float


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Non-dominated (cost, metric), cheapest first."""
    found: list[tuple[float, float]] = []
    for cost, loss in sorted((cost, -metric) for metric, cost in points):
        if not found or -loss > found[-1][1]:
            found.append((cost, -loss))
    return found


def _expected(front: Sequence[tuple[float, float]], cost: float) -> float:
    """The metric at a cost by straight lines over log2 cost between the points of a front."""
    for (left, low), (right, high) in zip(front, front[1:], strict=False):
        if left <= cost <= right:
            return low + (high - low) * math.log2(cost / left) / (math.log2(right / left) or 1.0)
    return front[-1][1] if cost > front[-1][0] else front[0][1]


def _share(left: float, cost: float, right: float) -> float:
    """Where a cost lies between two others, over log2 cost; a half in their middle, exactly."""
    if right <= left or cost == math.sqrt(left * right):
        return 0.5
    return math.log2(cost / left) / math.log2(right / left)


class _Places:
    """Costs, to be asked how many of them are at a place; quick for thousands."""

    def __init__(self, costs: Iterable[float]) -> None:
        self._octaves = sorted(map(math.log2, costs))

    def near(self, cost: float) -> int:
        """How many are at the same place."""
        at = math.log2(cost)
        return bisect_right(self._octaves, at + SAME) - bisect_left(self._octaves, at - SAME)


def most_room(
    points: Sequence[tuple[float, float]],
    running: Sequence[float],
    asked: Sequence[float],
    axes: Axes,
    within: tuple[float, float],
) -> float:
    """The cost at which one more trial is expected to add most to the hypervolume.

    Between two neighbours of the front, and at its ends towards the reference and the float model,
    the metric is taken to lie on a straight line over log2 cost. Fronts are concave, so that is
    cautious. A trial where there is one already is expected to gain `REPEAT`, for it starts from
    that one. Running trials count as points on their lines. Wherever trials were asked for before,
    less is expected each time: a place may be out of reach, or every trial there may fail. Below
    the reference nothing counts, so a trial that collapsed is not followed there.

    Args:
        points: (metric, cost) of every finished trial, at least one.
        running: costs that running trials are to keep.
        asked: costs that all trials were to keep, however they ended.
        axes: how the front is measured.
        within: the least and the largest cost that may be asked for.

    Returns:
        A cost within; that of a point where a repeat is best, which may be less by `SAME`.
    """
    front = _front((max(metric, axes.reference), cost) for metric, cost in points)
    least, most = within
    # The corners are not trained: they only bound what is.
    ends = [(axes.least, axes.reference), *front, (axes.most, max(axes.best, front[-1][1]))]
    known = sorted([*front, *((cost, _expected(ends, cost)) for cost in running)])
    ends = [ends[0], *known, ends[-1]]
    tried, under_way = _Places(asked), _Places(running)
    reached = _Places(cost for _, cost in points)
    best_gain, best_cost = -1.0, min(max(front[0][0], least), most)
    for index, ((left, below), (right, above)) in enumerate(zip(ends, ends[1:], strict=False)):
        width = max(0.0, math.log2(right / left))
        place = min(max(math.sqrt(left * right), least), most)
        share = _share(left, place, right)
        gain = max(0.0, above - below) * width * share * (1 - share) * 4.0 ** -tried.near(place)
        if SAME < share * width < width - SAME and gain > best_gain:
            best_gain, best_cost = gain, place
        if index == 0 or under_way.near(left) or not least * 2**-SAME <= left <= most:
            continue
        times = max(reached.near(left), tried.near(left))
        better = REPEAT[0] * max(0.0, axes.best - below)
        better += REPEAT[1] * (axes.best - axes.reference)
        gain = better * width * 2.0 ** (1 - times)
        if gain > best_gain:
            best_gain, best_cost = gain, left
    return best_cost
