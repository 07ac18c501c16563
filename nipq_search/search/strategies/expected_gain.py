"""Pure functions that find the cost at which a trial is expected to improve the front the most."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SAME = 0.05
"""Two costs that differ by at most this many octaves (factors of two) count as the same place on
the front."""

REPEAT_OF_LEAD, REPEAT_OF_SPAN = 0.2, 0.003
"""Expected improvement of the metric by a second trial at the same place: a fraction of the float
model's lead over the first trial, plus a fraction of the span from the reference to the float
model's metric. Each further trial is expected to gain half as much as the one before."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The rectangle in which the hypervolume of a front is measured.

    Metrics that are minimized are negated, so that greater is better.

    Attributes:
        cost: name of the front's cost.
        least: least reachable cost.
        most: cost of the uniform 8-bit model, or the largest reachable cost if that is lower.
        reference: metric that a point must exceed to count.
        best: metric of the float model.
    """

    cost: str
    least: float
    most: float
    reference: float
    best: float


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the non-dominated (metric, cost) points as (cost, metric), cheapest first."""
    found: list[tuple[float, float]] = []
    for cost, loss in sorted((cost, -metric) for metric, cost in points):
        if not found or -loss > found[-1][1]:
            found.append((cost, -loss))
    return found


def _interpolated(front: Sequence[tuple[float, float]], cost: float) -> float:
    """Return the metric at a cost, interpolated linearly over log2 cost.

    Beyond the ends of the front, it is the metric at that end.
    """
    for (left, low), (right, high) in zip(front, front[1:], strict=False):
        if left <= cost <= right:
            return low + (high - low) * math.log2(cost / left) / (math.log2(right / left) or 1.0)
    return front[-1][1] if cost > front[-1][0] else front[0][1]


def _position(left: float, cost: float, right: float) -> float:
    """Return where a cost lies between two others on a log2 scale: 0 at the left, 1 at the right.

    The result is 0.5 if the interval is empty.
    """
    if right <= left or cost == math.sqrt(left * right):
        return 0.5
    return math.log2(cost / left) / math.log2(right / left)


class _Places:
    """Counts the costs at the same place as a given one, in logarithmic time."""

    def __init__(self, costs: Iterable[float]) -> None:
        self._octaves = sorted(map(math.log2, costs))

    def count_near(self, cost: float) -> int:
        """Return the number of costs at the same place as the given one."""
        at = math.log2(cost)
        return bisect_right(self._octaves, at + SAME) - bisect_left(self._octaves, at - SAME)


def most_promising_cost(
    points: Sequence[tuple[float, float]],
    running: Sequence[float],
    asked: Sequence[float],
    axes: Axes,
    within: tuple[float, float],
) -> float:
    """Return the cost at which one more trial is expected to add the most to the hypervolume.

    Between neighboring points of the front, and between its ends and the corners of the rectangle,
    the metric is interpolated linearly in log2 cost. Fronts are usually concave in log2 cost, so
    the interpolation underestimates the metric that a trial between two points can reach. A trial
    at the place of an earlier one starts from that one, and its expected gain is determined by
    `REPEAT_OF_LEAD` and `REPEAT_OF_SPAN`. Running trials count as points on the interpolated
    front. Every trial that was targeted at a place lowers the expected gain there, because the
    place may be unreachable or every trial there may fail. Metrics below the reference are raised
    to the reference, so that a trial that collapsed does not attract further ones.

    Args:
        points: (metric, cost) of each finished trial; at least one.
        running: cost targets of the running trials.
        asked: cost targets of the trials so far, whatever their state.
        axes: the rectangle of the hypervolume.
        within: smallest and largest cost at which a trial may be placed.

    Returns:
        A cost in `within` or, if repeating a trial is expected to add the most, the cost of an
        existing point, which may lie up to `SAME` octaves below the smallest of these costs.
    """
    front = _front((max(metric, axes.reference), cost) for metric, cost in points)
    least, most = within
    # The corners of the rectangle are not trials; they only bound the expected gain.
    corners = (axes.least, axes.reference), (axes.most, max(axes.best, front[-1][1]))
    bounded = [corners[0], *front, corners[1]]
    known = sorted([*front, *((cost, _interpolated(bounded, cost)) for cost in running)])
    bounded = [corners[0], *known, corners[1]]
    tried, under_way = _Places(asked), _Places(running)
    reached = _Places(cost for _, cost in points)
    best_gain, best_cost = -1.0, min(max(front[0][0], least), most)
    neighbors = zip(bounded, bounded[1:], strict=False)
    for index, ((left, below), (right, above)) in enumerate(neighbors):
        width = max(0.0, math.log2(right / left))
        # A new place between the two points.
        place = min(max(math.sqrt(left * right), least), most)
        share = _position(left, place, right)
        gain = max(0.0, above - below) * width * share * (1 - share)
        gain *= 4.0 ** -tried.count_near(place)
        if SAME < share * width < width - SAME and gain > best_gain:
            best_gain, best_cost = gain, place
        # A repeat of the left point, unless it is a corner, a running trial, or out of range.
        out_of_range = not least * 2**-SAME <= left <= most
        if index == 0 or under_way.count_near(left) or out_of_range:
            continue
        times = max(reached.count_near(left), tried.count_near(left))
        better = REPEAT_OF_LEAD * max(0.0, axes.best - below)
        better += REPEAT_OF_SPAN * (axes.best - axes.reference)
        gain = better * width * 2.0 ** (1 - times)
        if gain > best_gain:
            best_gain, best_cost = gain, left
    return best_cost
