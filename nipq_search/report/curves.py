"""The figure with learning curves: a measured value by epoch, one line per trial."""

from __future__ import annotations

from typing import Any

from nipq_search.report.data import ReportData, embed, escape, number, text
from nipq_search.report.pareto import AXIS, LAYOUT

PREFIX = "metrics_"

SCRIPT = """
(() => {
  const known = JSON.parse(document.getElementById("curves-data").textContent);
  const box = document.getElementById("curves");
  const select = document.getElementById("curves-metric");
  let chosen = null;
  const draw = () => {
    const lines = known.metrics[select.value].map(line => ({
      type: "scatter", mode: "lines+markers", marker: {size: 5}, showlegend: false,
      x: line.x, y: line.y,
      line: {color: line.color, width: line.trial === chosen ? 4 : 1.5},
      opacity: chosen === null || line.trial === chosen ? 1 : 0.35,
      hovertemplate: "trial " + line.trial + ", epoch %{x}: %{y:.4g}<extra></extra>",
      customdata: line.x.map(() => line.trial), trial: line.trial,
    }));
    lines.sort((a, b) => (a.trial === chosen) - (b.trial === chosen));
    for (const line of lines) delete line.trial;
    Plotly.react(box, lines, known.layout, {responsive: true, displaylogo: false});
  };
  draw();
  select.addEventListener("change", draw);
  box.on("plotly_click", event => nipq.select(event.points[0].customdata));
  nipq.onSelect(trial => { chosen = trial; draw(); });
})();
"""


def section(data: ReportData) -> str:
    """Return the figure and the list of its values as a section; `""` if there are no curves."""
    metrics = lines(data)
    if not metrics:
        return ""
    first = _first(data, list(metrics))
    options = "".join(
        f"<option{' selected' if name == first else ''}>{escape(name)}</option>"
        for name in metrics
    )
    longest = int(data.curves["epoch"].max())
    layout = LAYOUT | {
        "height": 360,
        "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
        "hovermode": "closest",
        "xaxis": AXIS | {"title": {"text": "epoch"}, "dtick": max(1, longest // 10)},
        "yaxis": AXIS,
    }
    return (
        "<section><h2>Learning curves</h2><p><label>Value <select id='curves-metric'>"
        f"{options}</select></label></p><div id='curves' class='plot'></div>"
        f"{embed('curves-data', {'metrics': metrics, 'layout': layout})}"
        f"<script>{SCRIPT}</script></section>"
    )


def lines(data: ReportData) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of the figure by measured value: one per trial, in its budget's color."""
    colors = data.colors()
    labels = zip(data.results["trial"], data.results["budget_label"], strict=True)
    budgets = {int(trial): text(budget) for trial, budget in labels}
    metrics: dict[str, list[dict[str, Any]]] = {}
    for column in data.curves.columns:
        if not column.startswith(PREFIX):
            continue
        found = []
        for trial, rows in data.curves.groupby("trial"):
            pairs = zip(rows["epoch"].tolist(), rows[column].tolist(), strict=True)
            measured = [(x, y) for x, y in pairs if number(y) is not None]
            if measured:
                color = colors.get(budgets.get(int(str(trial)), ""), "#5f6b7a")
                line = {"x": [x for x, _ in measured], "y": [y for _, y in measured]}
                found.append({"trial": int(str(trial)), "color": color, **line})
        if found:
            metrics[column.removeprefix(PREFIX)] = found
    return metrics


def _first(data: ReportData, names: list[str]) -> str:
    """Return the value to select initially: the task's metric if present, else the first one."""
    preferred = (f"validation_{data.metric}", data.metric)
    return next((name for name in preferred if name in names), names[0])
