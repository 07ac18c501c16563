"""The figure with the bit-widths of the selected trial over its noise phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nipq_search.report.data import ReportData, embed, label
from nipq_search.report.pareto import AXIS, LAYOUT

MOVEMENT_TOLERANCE = 0.02
"""A bit-width counts as unmoved if it stays within this many bits of its initial value."""

SCRIPT = """
(() => {
  const known = JSON.parse(document.getElementById("movement-data").textContent);
  const box = document.getElementById("movement");
  const value = document.getElementById("movement-value");
  const hint = document.getElementById("movement-hint");
  let chosen = null;
  const draw = () => {
    const found = known.trials[chosen];
    hint.textContent = found ? found.hint : "No trial with a noise phase is selected.";
    const lines = found ? found[value.value] : {};
    Plotly.react(box, Object.keys(lines).map(name => ({
      type: "scatter", mode: "lines", name: name, x: found.steps, y: lines[name],
      hovertemplate: name + ", step %{x}: %{y:.3g}<extra></extra>",
    })), known.layout, {responsive: true, displaylogo: false});
  };
  draw();
  value.addEventListener("change", draw);
  nipq.onSelect(trial => { chosen = trial; draw(); });
})();
"""

History = Sequence[Mapping[str, Any]]
"""One entry per recorded step, with the keys `step`, `bits` and `gradient`.

The values of `bits` and `gradient` are mappings by tensor; see `TrainResult.history`.
"""


def never_moved(history: History) -> list[str]:
    """Return the tensors whose learned bit-width stayed near its initial value.

    See `MOVEMENT_TOLERANCE`. The list is empty if the history has fewer than two entries.
    """
    if len(history) < 2:
        return []
    start = history[0]["bits"]
    return [
        name
        for name, bits in start.items()
        if all(abs(e["bits"].get(name, bits) - bits) < MOVEMENT_TOLERANCE for e in history)
    ]


def section(data: ReportData) -> str:
    """Return the figure as a section of the page; `""` if no history has two or more entries."""
    trials = {
        trial: _document(history)
        for trial, history in sorted(data.histories.items())
        if len(history) > 1
    }
    if not trials:
        return ""
    layout = LAYOUT | {
        "height": 380,
        "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
        "hovermode": "closest",
        "xaxis": AXIS | {"title": {"text": "step of the noise phase"}},
        "yaxis": AXIS,
    }
    return (
        "<section><h2>Bits over time</h2><p><label>Value <select id='movement-value'>"
        "<option value='bits'>bit-width</option>"
        "<option value='gradient'>gradient of the loss</option></select></label></p>"
        "<p id='movement-hint' class='hint'></p><div id='movement' class='plot'></div>"
        f"{embed('movement-data', {'trials': trials, 'layout': layout})}"
        f"<script>{SCRIPT}</script></section>"
    )


def _document(history: History) -> dict[str, Any]:
    """Build the input of the figure's script for one trial: its lines, and a hint.

    The hint names bit-widths that never moved.
    """
    names = list(history[0]["bits"])
    unmoved = never_moved(history)
    hint = "Every bit-width moved."
    if unmoved:
        more = f" and {len(unmoved) - 5} more" if len(unmoved) > 5 else ""
        hint = (
            f"{len(unmoved)} of {len(names)} bit-widths never moved: "
            f"{', '.join(unmoved[:5])}{more}. A longer noise phase, a larger "
            "lr_bits or lambda, or a different initial value may move them."
        )
    return {
        "steps": [entry["step"] for entry in history],
        "hint": hint,
        **{
            key: {label(name): [entry[key].get(name) for entry in history] for name in names}
            for key in ("bits", "gradient")
        },
    }
