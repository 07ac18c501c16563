"""The figure with the bits of each layer of the selected trial."""

from __future__ import annotations

from typing import Any

from nipq_search.report.data import ReportData, cost, embed, escape, format_number, label, text
from nipq_search.report.pareto import AXIS, LAYOUT

SCRIPT = """
(() => {
  const known = JSON.parse(document.getElementById("bits-data").textContent);
  const box = document.getElementById("bits");
  const select = document.getElementById("bits-trial");
  const caption = document.getElementById("bits-caption");
  const bars = (layers, key, name, color) => ({
    type: "bar", name: name, marker: {color: color}, textposition: "outside", cliponaxis: false,
    x: layers.map(layer => layer.name), y: layers.map(layer => layer[key] ?? 0),
    text: layers.map(layer => layer[key] ?? "float"),
    customdata: layers.map(layer => layer.hover),
    hovertemplate: "%{customdata}<extra>" + name + ": %{text}</extra>",
  });
  nipq.onSelect(trial => {
    const found = known.trials[trial];
    select.value = found ? String(trial) : "";
    caption.textContent = found ? found.caption : "Trial " + trial + ": no bits available.";
    const layers = found ? found.layers : [];
    Plotly.react(box, [
      bars(layers, "weight_bits", "weight bits", "#0072b2"),
      bars(layers, "activation_bits", "activation bits", "#e69f00"),
    ], known.layout, {responsive: true, displaylogo: false});
  });
  select.addEventListener("change", () => {
    if (select.value) nipq.select(Number(select.value));
  });
})();
"""


def section(data: ReportData) -> str:
    """Return the bar chart and the list of trials as a section of the page."""
    known = document(data)
    options = "".join(
        f"<option value='{escape(trial)}'>{escape(entry['caption'])}</option>"
        for trial, entry in known["trials"].items()
    )
    return (
        "<section><h2>Bits by layer</h2><p><label>Trial <select id='bits-trial'>"
        f"<option value=''>–</option>{options}</select></label></p>"
        "<p id='bits-caption' class='hint'>No trial is selected.</p>"
        f"<div id='bits' class='plot'></div>{embed('bits-data', known)}"
        f"<script>{SCRIPT}</script></section>"
    )


def document(data: ReportData) -> dict[str, Any]:
    """Build the input of the figure's script: the layout, and each trial's caption and layers."""
    points = {point["trial"]: point for point in data.points()}
    trials: dict[int, dict[str, Any]] = {}
    for trial in sorted(data.layers):
        point = points.get(trial, {})
        parts = [f"trial {trial}", text(point.get("budget_label"))]
        if point:
            parts.append(f"{data.metric} {format_number(point['validation'])}")
            parts.append(f"{data.front_cost} {format_number(cost(point, data.front_cost))}")
        trials[trial] = {
            "caption": " · ".join(part for part in parts if part),
            "layers": [
                {
                    "name": label(layer.get("name")),
                    "weight_bits": layer.get("weight_bits"),
                    "activation_bits": layer.get("activation_bits"),
                    "hover": f"<b>{label(layer.get('name'))}</b> {label(layer.get('kind'))}<br>"
                    f"{format_number(layer.get('macs'))} MACs, "
                    f"{format_number(layer.get('bops'))} BOPs<br>"
                    f"{format_number(layer.get('weight_bytes'))} bytes of weights",
                }
                for layer in data.layers[trial]
            ],
        }
    widths = [
        layer.get(key) or 0
        for layers in data.layers.values()
        for layer in layers
        for key in ("weight_bits", "activation_bits")
    ]
    layout = LAYOUT | {
        "height": 380,
        "barmode": "group",
        "bargap": 0.25,
        "margin": {"l": 60, "r": 20, "t": 20, "b": 40},
        "legend": {"orientation": "h", "y": 1.12},
        "xaxis": AXIS | {"type": "category", "automargin": True},
        # Use the same scale for all trials, so that bars of different trials can be compared.
        "yaxis": AXIS | {"title": {"text": "bits"}, "range": [0, 1.15 * max([1, *widths])]},
    }
    return {"trials": trials, "layout": layout}
