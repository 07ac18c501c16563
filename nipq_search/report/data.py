"""What figures are made of, and the helpers that they share. All text given is untrusted."""

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
"""Colours of the budgets, told apart by colour-blind readers too; repeated when they run out."""

COST_NAMES = {
    "bops": "BOPs per sample",
    "weight_bytes": "weights in bytes",
    "activation_sum_bytes": "activations in bytes, summed",
    "activation_largest_bytes": "largest activation in bytes",
    "mean_weight_bits": "mean weight bits",
    "mean_activation_bits": "mean activation bits",
}

UNITS = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
"""From which size on a number is written in which unit."""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that a figure may use.

    Attributes:
        sweep: the sweep; `sweep.front` is the document that `front --json` prints.
        results: a row per trial, as `tracking.results_table` makes it.
        curves: a row per trial and epoch, as `tracking.curves_table` makes it.
        layers: by trial, a mapping per layer as `show --json` has them.
        histories: by trial, bit-widths over its noise phase, as `TrainResult.history` has them.
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
        """Points of the front document that have both a metric and a front cost, by cost."""
        found = [
            point
            for point in self.sweep.front.get("points") or []
            if number(point.get("validation")) is not None
            and (number(cost(point, self.front_cost)) or 0) > 0
        ]
        return sorted(found, key=lambda point: float(cost(point, self.front_cost) or 0))

    def best(self) -> int | None:
        """The trial that is shown first: the best of the front, else any with known layers."""
        sign = 1 if self.sweep.mode == "max" else -1
        front = [point for point in self.points() if point.get("on_front")]
        if front:
            return int(max(front, key=lambda point: sign * float(point["validation"]))["trial"])
        return min(self.layers, default=None)

    def colours(self) -> dict[str, str]:
        """A colour by budget label, in the order in which the budgets first occur."""
        labels = [text(label) for label in self.results["budget_label"]]
        labels += [text(point.get("budget_label")) for point in self.points()]
        unique = dict.fromkeys(label for label in labels if label)
        return {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(unique)}


def cost(holder: Mapping[str, Any], name: str) -> Any:
    """One cost of a point, a baseline or the float model; None where it is not known."""
    return (holder.get("cost") or {}).get(name)


def number(value: Any) -> float | None:
    """`value` as a finite number, or None for anything else (missing, NaN, infinite)."""
    try:
        result = float(value)
    except (TypeError, ValueError):  # None, text, and pandas' own missing value
        return None
    return result if math.isfinite(result) else None


def text(value: Any) -> str:
    """`value` as text; `""` where it is missing."""
    if value is None or type(value).__name__ in ("NAType", "NaTType") or value != value:
        return ""
    return str(value)


def escape(value: Any) -> str:
    """`value` as text that is safe in HTML, inside quoted attributes too."""
    return html.escape(text(value))


def label(value: Any) -> str:
    """`value` as text that is safe in a Plotly text, which knows some HTML and few entities."""
    return html.escape(text(value), quote=False)


def embed(name: str, document: Any) -> str:
    """`document` as a JSON script element with the id `name`; no text can end the element."""
    dumped = json.dumps(_finite(document), allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        dumped = dumped.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{dumped}</script>'


def human(value: Any) -> str:
    """A number for people: `5.3 G`, `24 k`, `0.912`; `–` where there is none."""
    figure = number(value)
    if figure is None:
        return "–"
    for least, factor, unit in UNITS:
        if abs(figure) >= least:
            return f"{figure / factor:.4g} {unit}"
    return f"{figure:.4g}"


def _finite(value: Any) -> Any:
    """`value` in plain JSON types, with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if value is None or isinstance(value, (bool, str, int)):
        return value
    return number(value)
