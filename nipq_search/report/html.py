"""The report page: all figures in one HTML file that works without a network or a server.

The page embeds Plotly's script. The figures share only the selected trial, through the page's
JavaScript object `nipq`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nipq_search.records import SweepRecord
from nipq_search.report.data import ReportData, escape, format_number, number
from nipq_search.report.figures import FIGURES

if TYPE_CHECKING:
    import pandas as pd

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f3f5f8; color: #28303d; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 6px; }
section { background: white; border: 1px solid #e2e6ec; border-radius: 10px; padding: 18px 20px;
  margin-top: 18px; }
.hint { color: #6b7480; margin: 0 0 8px; }
.empty { font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 18px; }
.card { background: white; border: 1px solid #e2e6ec; border-radius: 10px; padding: 12px 16px; }
.card b { display: block; font-size: 22px; }
.card span { color: #6b7480; font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid #edf0f4; }
th, #trials td { white-space: nowrap; }
th { color: #6b7480; font-weight: 600; }
#trials th, #trials tbody tr { cursor: pointer; }
#trials tbody tr:hover { background: #f3f7fc; }
tr.chosen { background: #e4f0fa; }
td.FAIL { color: #b3261e; } td.COMPLETE { color: #1b7a43; } td.PRUNED { color: #8a6100; }
.reason { overflow-wrap: anywhere; }
select { font: inherit; max-width: 100%; padding: 3px 6px; }
pre { overflow-x: auto; font-size: 12px; margin: 8px 0 0; }
"""

NIPQ = """
const nipq = {
  selected: null,
  listeners: [],
  onSelect(listener) { this.listeners.push(listener); },
  select(trial) {
    this.selected = trial;
    for (const listener of this.listeners) listener(trial);
  },
};
"""


def render(
    sweep: SweepRecord,
    results: pd.DataFrame,
    curves: pd.DataFrame,
    layers: Mapping[int, Sequence[Mapping[str, Any]]],
    histories: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
) -> str:
    """Render the report of a finished or running sweep.

    Args:
        sweep: the sweep with its front document.
        results: one row per trial (`tracking.results_table`).
        curves: one row per trial and epoch (`tracking.curves_table`).
        layers: by trial, one mapping per layer in the format of `show --json`; trials may be
            missing.
        histories: by trial, bit-widths over the noise phase in the format of
            `TrainResult.history`; trials may be missing.

    Returns:
        The content of an HTML file.
    """
    from plotly.offline import get_plotlyjs

    data = ReportData(
        sweep=sweep, results=results, curves=curves, layers=layers, histories=histories or {}
    )
    best = data.best()
    start = "" if best is None else f"<script>nipq.select({best});</script>"
    name = escape(sweep.name)
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{name}: Pareto front</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script><script>{NIPQ}</script></head><body><main>"
        f"<h1>{name}</h1><p class='hint'>{_subtitle(sweep)}</p>{_cards(data)}"
        f"{''.join(figure(data) for figure in FIGURES.values())}{_config(sweep)}"
        f"</main>{start}</body></html>\n"
    )


def _subtitle(sweep: SweepRecord) -> str:
    """Return the escaped line below the title: task, data, metric and BOPs convention."""
    dataset = sweep.dataset.get("name")
    parts = [f"Task {sweep.task}", f"data {dataset}" if dataset else ""]
    better = "higher" if sweep.mode == "max" else "lower"
    parts.append(f"{sweep.metric}, {better} is better")
    version = sweep.front.get("bops_convention")
    parts.append(f"BOPs convention {version}" if version is not None else "")
    return escape(" · ".join(part for part in parts if part))


def _cards(data: ReportData) -> str:
    """Return the cards with the key numbers of the sweep."""
    front = data.sweep.front
    states = data.results["state"].value_counts()
    trials = ", ".join(f"{count} {str(state).lower()}" for state, count in states.items())
    validation = number((front.get("float") or {}).get("validation"))
    points = sum(bool(point.get("on_front")) for point in data.points())
    cards = [
        (str(points), "points on the front"),
        (format_number(front.get("hypervolume")), "hypervolume, validation"),
        (format_number(front.get("test_hypervolume")), "hypervolume, test"),
        (format_number(validation), f"float model's {data.metric}"),
        (str(len(data.results)), f"trials: {trials}" if trials else "trials"),
        (format_number(front.get("total_samples")), "samples processed"),
    ]
    return (
        "<div class='cards'>"
        + "".join(
            f"<div class='card'><b>{escape(value)}</b><span>{escape(name)}</span></div>"
            for value, name in cards
        )
        + "</div>"
    )


def _config(sweep: SweepRecord) -> str:
    """Return the resolved configuration in a collapsed section."""
    config = json.dumps(sweep.config, indent=2, default=str, ensure_ascii=False)
    return (
        "<section><details><summary>Configuration</summary>"
        f"<pre>{escape(config)}</pre></details></section>"
    )
