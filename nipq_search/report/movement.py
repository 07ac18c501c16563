"""How the bit-widths of the selected trial moved in its noise phase, and which did not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nipq_search.report.data import ReportData, embed, label
from nipq_search.report.pareto import AXIS, LAYOUT

STILL = 0.02
"""A bit-width that stays within so many bits of its start has not moved."""

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
"""Notes with `step`, `bits` and `gradient`, the last two by tensor."""


def never_moved(history: History) -> list[str]:
    """Tensors whose learned bit-width stayed where it started; empty without two notes."""
    if len(history) < 2:
        return []
    start = history[0]["bits"]
    return [
        name
        for name, bits in start.items()
        if all(abs(note["bits"].get(name, bits) - bits) < STILL for note in history)
    ]


def section(data: ReportData) -> str:
    """The lines and a choice of what they show; `""` where no trial had a noise phase."""
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
        "<option value='gradient'>derivative of the loss by it</option></select></label></p>"
        "<p id='movement-hint' class='hint'></p><div id='movement' class='plot'></div>"
        f"{embed('movement-data', {'trials': trials, 'layout': layout})}"
        f"<script>{SCRIPT}</script></section>"
    )


def _document(history: History) -> dict[str, Any]:
    """One trial's lines, and what to say of those that are flat."""
    names = list(history[0]["bits"])
    still = never_moved(history)
    hint = "Every bit-width moved."
    if still:
        more = f" and {len(still) - 5} more" if len(still) > 5 else ""
        hint = (
            f"{len(still)} of {len(names)} bit-widths never moved: "
            f"{', '.join(still[:5])}{more}. A longer noise phase, a greater "
            "lr_bits or lambda, or a start elsewhere may move them."
        )
    return {
        "steps": [note["step"] for note in history],
        "hint": hint,
        **{
            key: {label(name): [note[key].get(name) for note in history] for name in names}
            for key in ("bits", "gradient")
        },
    }
