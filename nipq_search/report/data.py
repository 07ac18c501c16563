"""The input to the figures, and shared helpers. All text in the input is untrusted."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nipq_search.records import SweepRecord

if TYPE_CHECKING:
    import pandas as pd

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7b61c4", "#b08600", "#56b4e9", "#5f6b7a")
"""Colors of the budgets, which color-blind readers can distinguish; reused if there are more."""

COST_LABELS = {
    "bops": "BOPs per sample",
    "weight_bytes": "weights in bytes",
    "activation_sum_bytes": "activations in bytes, summed",
    "activation_largest_bytes": "largest activation in bytes",
    "mean_weight_bits": "mean weight bits",
    "mean_activation_bits": "mean activation bits",
}

UNITS = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
"""Smallest absolute value, divisor and prefix of each unit."""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The input to all figures.

    Attributes:
        sweep: the sweep; `sweep.front` is the document of `front --json`.
        results: one row per trial, in the format of `tracking.results_table`.
        curves: one row per trial and epoch, in the format of `tracking.curves_table`.
        layers: by trial, one mapping per layer in the format of `show --json`.
        histories: by trial, bit-widths over the noise phase, in the format of
            `TrainResult.history`.
    """

    sweep: SweepRecord
    results: pd.DataFrame
    curves: pd.DataFrame
    layers: Mapping[int, Sequence[Mapping[str, Any]]]
    histories: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def front_cost(self) -> str:
        """Name of the cost on the front's axis."""
        return str(self.sweep.front.get("front_cost") or "bops")

    @property
    def metric(self) -> str:
        """Name of the task's metric."""
        return self.sweep.metric

    def points(self) -> list[Mapping[str, Any]]:
        """Return the COMPLETE trials with a metric and a positive front cost, cheapest first."""
        found = [
            point
            for point in self.sweep.front.get("points") or []
            if number(point.get("validation")) is not None
            and (number(cost(point, self.front_cost)) or 0) > 0
        ]
        return sorted(found, key=lambda point: float(cost(point, self.front_cost) or 0))

    def best(self) -> int | None:
        """Return the trial to select initially, or None if there is no suitable trial.

        This is the trial on the front with the best metric. If the front is empty, it is the trial
        with the lowest number among those whose layers are known.
        """
        sign = 1 if self.sweep.mode == "max" else -1
        front = [point for point in self.points() if point.get("on_front")]
        if front:
            return int(max(front, key=lambda point: sign * float(point["validation"]))["trial"])
        return min(self.layers, default=None)

    def colors(self) -> dict[str, str]:
        """Return a color for each budget label, assigned in order of first appearance."""
        labels = [text(label) for label in self.results["budget_label"]]
        labels += [text(point.get("budget_label")) for point in self.points()]
        unique = dict.fromkeys(label for label in labels if label)
        return {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(unique)}


def cost(holder: Mapping[str, Any], name: str) -> Any:
    """Return one cost of a point, a baseline or the float model; None if it is unknown."""
    return (holder.get("cost") or {}).get(name)


def number(value: Any) -> float | None:
    """Convert `value` to a float; return None if it cannot be converted or is not finite."""
    try:
        result = float(value)
    except (TypeError, ValueError):  # None, text, and the missing value of pandas
        return None
    return result if math.isfinite(result) else None


def text(value: Any) -> str:
    """Convert `value` to text; `""` if it is missing."""
    if value is None or type(value).__name__ in ("NAType", "NaTType") or value != value:
        return ""
    return str(value)


def escape(value: Any) -> str:
    """Escape `value` for HTML, including quoted attributes."""
    return html.escape(text(value))


def label(value: Any) -> str:
    """Escape `value` for Plotly text, which supports some HTML tags but only a few entities.

    Quotation marks are therefore not escaped.
    """
    return html.escape(text(value), quote=False)


def embed(name: str, document: Any) -> str:
    """Return a script element that contains `document` as JSON.

    The JSON is escaped so that no text in it can close the element.

    Args:
        name: ID of the element.
        document: the document; non-finite numbers become null.
    """
    dumped = json.dumps(_finite(document), allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        dumped = dumped.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{dumped}</script>'


def format_number(value: Any) -> str:
    """Format a number with four significant digits: `5.3 G`, `24 k`, `0.912`.

    The result is `–` if the number is missing or not finite.
    """
    figure = number(value)
    if figure is None:
        return "–"
    for least, factor, unit in UNITS:
        if abs(figure) >= least:
            return f"{figure / factor:.4g} {unit}"
    return f"{figure:.4g}"


def _finite(value: Any) -> Any:
    """Convert `value` to JSON types, with null for non-finite numbers."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if value is None or isinstance(value, (bool, str, int)):
        return value
    return number(value)
