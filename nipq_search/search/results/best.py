"""The document of `best`: the best trained point within limits, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nipq_search.records import SCHEMA


def best_document(
    points: Sequence[Mapping[str, Any]],
    limits: Mapping[str, float],
    facts: Mapping[str, Any],
    layers_of: Callable[[int], Sequence[Mapping[str, Any]]] = lambda trial: (),
) -> dict[str, Any]:
    """Build the document of `best --json`, except the path of the model.

    Args:
        points: points of the front document, that is, all COMPLETE trials.
        limits: maximum by cost name, in the unit of the cost.
        facts: the sweep's resolved facts, `ResolvedSweep.as_json()`.
        layers_of: returns the bits and costs of each layer of a trial.

    Returns:
        The document. `point` is the best point within the limits, or None. If it is None,
        `nearest` is the point that exceeds the limits least, or None if there are no points, and
        `blocks` lists the reasons: limits that are unreachable or exceeded, or the lack of points.
    """
    sign = 1.0 if facts["mode"] == "max" else -1.0

    def excess(point: Mapping[str, Any]) -> float:
        return max((point["cost"][name] / limit for name, limit in limits.items()), default=0.0)

    inside = [point for point in points if excess(point) <= 1]
    if inside:
        chosen = max(inside, key=lambda p: (sign * p["validation"], -excess(p)))
        return {
            "schema": SCHEMA,
            "limits": dict(limits),
            "point": chosen,
            "nearest": None,
            "blocks": [],
        }
    nearest = min(points, key=lambda p: (excess(p), -sign * p["validation"]), default=None)
    blocks = []
    for name, limit in limits.items():
        least = facts["costs"][name]["least"]
        set_by = facts.get("least_set_by", {}).get(name)  # absent in older sweeps
        by = f" (set by {set_by})" if set_by else ""
        if least > limit:
            blocks.append(
                f"{name}: {limit:,.6g} is below the least reachable cost {least:,.6g} "
                f"with the allowed bit-widths{by}"
            )
        elif nearest is not None and nearest["cost"][name] > limit:
            largest = _largest(name, layers_of(nearest["trial"]))
            blocks.append(
                f"{name}: the nearest trained point costs {nearest['cost'][name]:,.6g}{largest}, "
                f"the limit is {limit:,.6g}, the least reachable cost is {least:,.6g}{by}; add a "
                "budget at or below the limit and run again"
            )
    if nearest is None:
        blocks.append("no trial has completed yet")
    return {
        "schema": SCHEMA,
        "limits": dict(limits),
        "point": None,
        "nearest": nearest,
        "blocks": blocks,
    }


def _largest(name: str, layers: Sequence[Mapping[str, Any]]) -> str:
    """Describe the layers with the largest shares of a cost; `""` if no layer has a share."""
    costs = {row["name"]: row.get(name) or 0 for row in layers}
    total = sum(costs.values())
    if not total:
        return ""
    largest = sorted(costs, key=lambda layer: -costs[layer])[:3]
    return f" (most of it {', '.join(f'{n}: {100 * costs[n] / total:.0f} %' for n in largest)})"
