"""The Pareto front and its hypervolume, as pure functions of points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def non_dominated(points: Mapping[int, tuple[float, float]], mode: str) -> set[int]:
    """Keys of the points that no other one is at least as good and as cheap as.

    Args:
        points: (metric, cost) by key. Of equal points all stay, as in `optuna best-trials`.
        mode: `max` or `min`, of the metric.
    """
    sign = 1.0 if mode == "max" else -1.0
    # Cheapest first, of equal prices the best first: what follows can only add by being better.
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
    """Area under the front in (log2 cost, metric), as a share of a rectangle.

    The rectangle reaches from the least reachable cost to the uniform 8-bit model's, and from the
    reference metric to the float model's: 1.0 is float accuracy at the least cost. A metric above
    the float model's counts in full, so the share can exceed 1.

    Args:
        points: (metric, cost); at each cost the metric of the dearest point within it counts.
        axis: least reachable cost and the uniform 8-bit model's.
        reference: metric below which nothing counts.
        best: the float model's metric.
        mode: `max` or `min`.

    Returns:
        The share; None where the rectangle is empty.
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
    """The reference where none is named, worse than the float model's metric `best`.

    0.8 of it, 1.25 if minimized; 1.2 and 0.75 of one that is negative, such as a log-likelihood.
    """
    if mode == "max":
        return 0.8 * best if best > 0 else 1.2 * best
    return 1.25 * best if best > 0 else 0.75 * best
