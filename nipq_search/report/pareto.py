"""The Pareto plot: metric against cost, with the budgets, the float model and the baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nipq_search.report.data import (
    COST_LABELS,
    ReportData,
    cost,
    embed,
    format_number,
    label,
    number,
    text,
)

AXIS = {"gridcolor": "#e8ebf0", "linecolor": "#9aa3af", "zeroline": False, "ticks": "outside"}
LAYOUT: dict[str, Any] = {
    "template": "none",
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#28303d"},
    "paper_bgcolor": "white",
    "plot_bgcolor": "white",
    "hoverlabel": {"align": "left"},
}
"""Plotly layout shared by all figures."""

SCRIPT = """
(() => {
  const figure = JSON.parse(document.getElementById("pareto-data").textContent);
  const box = document.getElementById("pareto");
  Plotly.newPlot(box, figure.data, figure.layout, {responsive: true, displaylogo: false});
  box.on("plotly_click", event => {
    const trial = event.points[0].customdata;
    if (trial !== undefined && trial !== null) nipq.select(trial);
  });
  const ring = figure.data.length - 1;
  nipq.onSelect(trial => {
    let x = [], y = [];
    for (const trace of figure.data.slice(0, ring)) {
      const at = (trace.customdata || []).indexOf(trial);
      if (at >= 0) { x = [trace.x[at]]; y = [trace.y[at]]; }
    }
    Plotly.restyle(box, {x: [x], y: [y]}, [ring]);
  });
})();
"""


def section(data: ReportData) -> str:
    """Return the figure as a section of the page; a click on a point selects its trial."""
    note = "" if data.points() else "<p class='empty'>No trial has finished yet.</p>"
    return (
        "<section><h2>Pareto front</h2>"
        "<p class='hint'>Click a point to see its bits by layer. Filled points are on the "
        f"front; hollow points are dominated.</p>{note}"
        f"<div id='pareto' class='plot'></div>{embed('pareto-data', figure(data))}"
        f"<script>{SCRIPT}</script></section>"
    )


def figure(data: ReportData) -> dict[str, Any]:
    """Build the Plotly figure (`data` and `layout`); the last trace marks the selection."""
    points, colors = data.points(), data.colors()
    budgets, uniform = budget_targets(data), baselines(data)
    traces = [_front_line(data, points)]
    for name, color in {**colors, "": "#5f6b7a"}.items():
        own = [point for point in points if text(point.get("budget_label")) == name]
        if own:
            traces.append(_budget_points(data, name or "no budget", color, own))
    traces += [_baseline_points(data, uniform)] if uniform else []
    ring = {"symbol": "circle-open", "size": 22, "color": "#28303d", "line": {"width": 2}}
    traces.append(_trace(x=[], y=[], marker=ring, showlegend=False, hoverinfo="skip"))

    xs = [float(cost(item, data.front_cost)) for item in [*points, *uniform]]
    xs += list(budgets.values())
    ys = [float(item["validation"]) for item in [*points, *uniform]]
    shapes = [_line(x0=x, x1=x, y0=0, y1=1, yref="paper", dash="dot", color=colors.get(name))
              for name, x in budgets.items()]  # fmt: skip
    notes = [_budget_note(name, x, colors.get(name)) for name, x in budgets.items()]
    reference = number((data.sweep.front.get("float") or {}).get("validation"))
    if reference is not None:
        ys.append(reference)
        shapes.append(_line(x0=0, x1=1, xref="paper", y0=reference, y1=reference, dash="dash"))
        notes.append(_float_note(reference, left=data.sweep.mode == "max"))
    layout = LAYOUT | {
        "height": 520,
        "margin": {"l": 70, "r": 20, "t": 30, "b": 60},
        "hovermode": "closest",
        "shapes": shapes,
        "annotations": notes,
        "legend": {"orientation": "h", "y": -0.16},
        "xaxis": AXIS | {"title": {"text": f"{_axis_name(data)} (log₂)"}} | log2_axis(xs),
        "yaxis": AXIS | {"title": {"text": f"validation {label(data.metric)}"}} | _range(ys),
    }
    return {"data": traces, "layout": layout}


def budget_targets(data: ReportData) -> dict[str, float]:
    """Return the absolute targets by budget label, for budgets that limit the front cost."""
    targets: dict[str, float] = {}
    column = f"budget_{data.front_cost}"
    if column in data.results:
        pairs = zip(data.results["budget_label"], data.results[column], strict=True)
        for name, target in pairs:
            found = number(target)
            if found is not None and found > 0 and text(name):
                targets.setdefault(text(name), found)
    return targets


def baselines(data: ReportData) -> list[dict[str, Any]]:
    """Return the uniform LSQ models with a metric and a positive front cost, cheapest first."""
    known = data.sweep.front.get("baselines")
    if known is None:
        known = [asdict(baseline) for baseline in data.sweep.baselines]
    usable = [
        dict(baseline)
        for baseline in known
        if number(baseline.get("validation")) is not None
        and (number(cost(baseline, data.front_cost)) or 0) > 0
    ]
    return sorted(usable, key=lambda baseline: float(cost(baseline, data.front_cost)))


def log2_axis(values: Sequence[float]) -> dict[str, Any]:
    """Return the settings of a logarithmic axis that spans `values` with a margin at both ends.

    The ticks are powers of two times a power of 1000: 0.5 G, 1 G, 2 G. If `values` is empty, the
    axis spans 1 to 2.
    """
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    low, high = low / 1.15, high * 1.15
    unit = 1000.0 ** math.floor(math.log(math.sqrt(low * high), 1000))
    powers = range(math.floor(math.log2(low / unit)), math.ceil(math.log2(high / unit)) + 1)
    every = max(1, len(powers) // 12)
    ticks = [unit * 2.0**power for power in powers][::every]
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": ticks,
        "ticktext": [format_number(tick) for tick in ticks],
    }


def _axis_name(data: ReportData) -> str:
    return label(COST_LABELS.get(data.front_cost, data.front_cost))


def _range(values: Sequence[float]) -> dict[str, Any]:
    """Return the settings of a linear axis that spans `values` with a margin at both ends."""
    if not values:
        return {"range": [0, 1]}
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    return {"range": [low - margin, high + margin]}


def _trace(**settings: Any) -> dict[str, Any]:
    return {"type": "scatter", "mode": "markers", **settings}


def _front_line(data: ReportData, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the trace of the front, a step function: the best metric up to each cost."""
    front = [point for point in points if point.get("on_front")]
    return _trace(
        name="front",
        mode="lines",
        x=[cost(point, data.front_cost) for point in front],
        y=[point["validation"] for point in front],
        line={"shape": "hv", "color": "#9aa3af", "width": 2},
        hoverinfo="skip",
    )


def _budget_points(
    data: ReportData, name: str, color: str, points: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    front = [bool(point.get("on_front")) for point in points]
    return _trace(
        name=label(name),
        x=[cost(point, data.front_cost) for point in points],
        y=[point["validation"] for point in points],
        customdata=[point["trial"] for point in points],
        text=[_hover(data, point) for point in points],
        hovertemplate="%{text}<extra></extra>",
        marker={
            "color": [color if on else "rgba(255,255,255,0.85)" for on in front],
            "size": [13 if on else 10 for on in front],
            "opacity": 1,
            "line": {"color": color, "width": 2},
        },
    )


def _baseline_points(data: ReportData, uniform: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [f" {baseline.get('bits', '?')} bits" for baseline in uniform]
    return _trace(
        name="uniform LSQ",
        mode="markers+text",
        x=[cost(baseline, data.front_cost) for baseline in uniform],
        y=[baseline["validation"] for baseline in uniform],
        text=[label(name) for name in names],
        textposition="middle right",
        hovertemplate=f"uniform LSQ, %{{text}}<br>{label(data.metric)} %{{y:.4g}}<br>"
        f"{_axis_name(data)} %{{x:.4s}}<extra></extra>",
        marker={"symbol": "diamond", "size": 11, "color": "#28303d"},
    )


def _hover(data: ReportData, point: Mapping[str, Any]) -> str:
    lines = [
        f"<b>trial {label(point['trial'])}</b>  {label(point.get('budget_label'))}",
        f"validation {label(data.metric)} {format_number(point['validation'])}",
    ]
    if number(point.get("test")) is not None:
        lines.append(f"test {label(data.metric)} {format_number(point['test'])}")
    costs = (point.get("cost") or {}).items()
    lines += [
        f"{label(COST_LABELS.get(name, name))} {format_number(value)}" for name, value in costs
    ]
    return "<br>".join(lines)


def _line(*, dash: str, color: str | None = None, **ends: Any) -> dict[str, Any]:
    return {
        "type": "line",
        "layer": "below",
        "line": {"dash": dash, "width": 1.5, "color": color or "#6b7480"},
        **ends,
    }


def _budget_note(name: str, target: float, color: str | None) -> dict[str, Any]:
    return {
        "x": math.log10(target),
        "y": 0.02,
        "yref": "paper",
        "text": label(name),
        "textangle": -90,
        "showarrow": False,
        "xanchor": "left",  # the points of a budget are just to the left of its line
        "yanchor": "bottom",
        "font": {"size": 11, "color": color or "#6b7480"},
    }


def _float_note(reference: float, left: bool) -> dict[str, Any]:
    # If the metric is maximized, the cheap points at the left end of the plot lie far below the
    # line, so that end has the most space for the label.
    return {
        "x": 0.01 if left else 0.99,
        "xref": "paper",
        "y": reference,
        "text": f"float model {format_number(reference)}",
        "showarrow": False,
        "xanchor": "left" if left else "right",
        "yanchor": "bottom",
        "font": {"size": 12, "color": "#6b7480"},
    }
