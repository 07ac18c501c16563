"""Where the next trial adds most to a front, as pure functions of its points."""

from __future__ import annotations

import math
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
    """Non-dominated (log2 cost, metric), cheapest first."""
    found: list[tuple[float, float]] = []
    for metric, cost in sorted(points, key=lambda p: (p[1], -p[0])):
        if not found or metric > found[-1][1]:
            found.append((math.log2(cost), metric))
    return found


def _expected(front: Sequence[tuple[float, float]], place: float) -> float:
    """The metric at a cost by straight lines between the points of a front."""
    for (left, low), (right, high) in zip(front, front[1:], strict=False):
        if left <= place <= right:
            return low + (high - low) * (place - left) / (right - left or 1.0)
    return front[-1][1] if place > front[-1][0] else front[0][1]


def most_room(
    points: Sequence[tuple[float, float]], running: Sequence[float], axes: Axes
) -> float:
    """The cost at which one more trial is expected to add most to the hypervolume.

    Between two neighbours of the front, and at its ends towards the reference and the float model,
    the metric is taken to lie on a straight line over log2 cost. Fronts are concave, so that is
    cautious. A trial where there is one already is expected to gain `REPEAT`, for it starts from
    that one. Running trials count as points on their lines.

    Args:
        points: (metric, cost) of every finished trial, at least one.
        running: costs that running trials are to keep.
        axes: how the front is measured.
    """
    front = _front(points)
    for cost in running:
        place = math.log2(cost)
        front = _front([(m, 2.0**x) for x, m in front] + [(_expected(front, place), cost)])
    low, high = math.log2(axes.least), math.log2(axes.most)
    # The corners are not trained: they only bound what is.
    ends = [(low, axes.reference), *front, (high, max(axes.best, front[-1][1]))]
    places = [math.log2(cost) for _, cost in points]
    best_gain, best_place = -1.0, front[0][0]
    for index, ((left, below), (right, above)) in enumerate(zip(ends, ends[1:], strict=False)):
        gain = max(0.0, above - below) * max(0.0, right - left) / 4
        if right - left > 2 * SAME and gain > best_gain:
            best_gain, best_place = gain, (left + right) / 2
        if index == 0 or any(abs(math.log2(cost) - left) <= SAME for cost in running):
            continue
        times = sum(abs(place - left) <= SAME for place in places)
        better = REPEAT[0] * max(0.0, axes.best - below)
        better += REPEAT[1] * (axes.best - axes.reference)
        gain = better * 2.0 ** (1 - times) * max(0.0, right - left)
        if gain > best_gain:
            best_gain, best_place = gain, left
    return float(2.0**best_place)
