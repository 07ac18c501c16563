"""The Pareto front and its hypervolume, as pure functions of points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def non_dominated(points: Mapping[int, tuple[float, float]], mode: str) -> set[int]:
    """Return the keys of the points that no other point dominates.

    Args:
        points: (metric, cost) by key. Equal points are all kept, as in `optuna best-trials`.
        mode: direction of the metric, `max` or `min`; the cost is minimized.
    """
    sign = 1.0 if mode == "max" else -1.0
    # Visit points by increasing cost and, at equal cost, better metrics first. A point is on the
    # front only if its metric beats all earlier ones, or if it equals the last front point.
    ordered = sorted(points, key=lambda key: (points[key][1], -sign * points[key][0]))
    front: set[int] = set()
    best, best_cost = float("-inf"), float("nan")
    for key in ordered:
        metric, cost = sign * points[key][0], points[key][1]
        if metric > best or (metric == best and cost == best_cost):
            front.add(key)
            best, best_cost = metric, cost
    return front


def hypervolume(
    points: Sequence[tuple[float, float]],
    *,
    axis: tuple[float, float],
    reference: float,
    best: float,
    mode: str,
) -> float | None:
    """Return the area under the front over log2 cost, as a fraction of a reference rectangle.

    The rectangle spans the costs from the least reachable one to that of the uniform 8-bit model,
    and the metrics from the reference to that of the float model. A point with the metric of the
    float model at the least reachable cost gives 1.0. Metrics better than the float model's count
    in full, so the result can exceed 1.

    Args:
        points: (metric, cost) of each point on the front. The height of the area at a cost is the
            metric of the most expensive point that does not exceed this cost.
        axis: least reachable cost, and cost of the uniform 8-bit model.
        reference: metric that a point must beat in order to contribute.
        best: metric of the float model.
        mode: direction of the metric, `max` or `min`.

    Returns:
        The fraction, or None if the rectangle is empty.
    """
    sign = 1.0 if mode == "max" else -1.0
    low, high = (math.log2(max(end, 1e-300)) for end in axis)
    height = sign * (best - reference)
    if high <= low or height <= 0:
        return None
    area = 0.0
    ordered = sorted(points, key=lambda point: point[1])
    for index, (metric, cost) in enumerate(ordered):
        start = min(max(math.log2(max(cost, 1e-300)), low), high)
        end = high
        if index + 1 < len(ordered):
            end = min(max(math.log2(max(ordered[index + 1][1], 1e-300)), low), high)
        area += max(0.0, sign * (metric - reference)) * (end - start)
    return area / ((high - low) * height)


def default_reference(best: float, mode: str) -> float:
    """Return the default reference metric for a float model with the metric `best`.

    It is 0.8 times `best`, or 1.25 times `best` if the metric is minimized. For a negative `best`,
    such as a log-likelihood, the factors are 1.2 and 0.75, respectively. The reference is thus
    worse than `best`, unless `best` is 0.
    """
    if mode == "max":
        return 0.8 * best if best > 0 else 1.2 * best
    return 1.25 * best if best > 0 else 0.75 * best
