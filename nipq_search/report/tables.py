"""The table of all trials and the table of failed trials."""

from __future__ import annotations

from typing import Any

from nipq_search.report.data import ReportData, escape, format_number, number, text

SCRIPT = """
(() => {
  const table = document.getElementById("trials");
  const body = table.tBodies[0];
  for (const row of body.rows) {
    row.addEventListener("click", () => nipq.select(Number(row.dataset.trial)));
  }
  nipq.onSelect(trial => {
    for (const row of body.rows) {
      row.classList.toggle("chosen", Number(row.dataset.trial) === trial);
    }
  });
  let last = null, sign = 1;
  for (const head of table.tHead.rows[0].cells) {
    head.addEventListener("click", () => {
      sign = last === head ? -sign : 1;
      last = head;
      const key = row => row.cells[head.cellIndex].dataset.value;
      const order = (a, b) => a !== "" && b !== "" && !isNaN(a) && !isNaN(b)
        ? a - b : a.localeCompare(b);
      body.append(...[...body.rows].sort((a, b) => sign * order(key(a), key(b))));
    });
  }
})();
"""


def trials(data: ReportData) -> str:
    """Return the table of all trials as a section of the page; `""` if there are no trials.

    A click on a heading sorts the table, and a click on a row selects its trial.
    """
    results = data.results
    if not len(results):
        return ""
    costs = [name for name in results.columns if name.startswith("cost_")]
    # The front cost comes first.
    costs.sort(key=lambda name: name != f"cost_{data.front_cost}")
    params = [name for name in results.columns if name.startswith("params_")]
    columns = ["trial", "state", "on_front", "budget_label", "validation", "test"]
    columns += [*costs, *params, "samples", "seconds", "parent", "attempts"]
    titles = {"on_front": "front", "budget_label": "budget"}
    head = "".join(f"<th>{escape(titles.get(name, _title(name)))}</th>" for name in columns)
    body = "".join(
        f"<tr data-trial='{int(row['trial'])}'>{''.join(_cell(n, row[n]) for n in columns)}</tr>"
        for row in results.to_dict("records")
    )
    return (
        "<section><h2>Trials</h2><p class='hint'>Click a heading to sort the table, or a row to "
        f"select a trial.</p><div class='wide'><table id='trials'><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div><script>{SCRIPT}</script></section>"
    )


def failures(data: ReportData) -> str:
    """Return the table of failed trials and their reasons; `""` if no trial has failed."""
    rows = [row for row in data.results.to_dict("records") if row["state"] == "FAIL"]
    if not rows:
        return ""
    items = "".join(
        f"<tr><td>{int(row['trial'])}</td><td>{escape(row['budget_label'])}</td>"
        f"<td class='reason'>{escape(row['reason']) or 'unknown reason'}</td>"
        f"<td>{escape(row['folder'])}</td></tr>"
        for row in rows
    )
    return (
        "<section><h2>Failed trials</h2><table id='failures'><thead><tr><th>trial</th>"
        f"<th>budget</th><th>reason</th><th>folder</th></tr></thead><tbody>{items}</tbody>"
        "</table></section>"
    )


def _title(column: str) -> str:
    """Return the heading of a column: its name, without `cost_` or `params_`, and with spaces."""
    for prefix in ("cost_", "params_"):
        column = column.removeprefix(prefix)
    return column.replace("_", " ")


def _cell(column: str, value: Any) -> str:
    """Return one cell of the table, which is sorted by the attribute `data-value` of its cells."""
    if column == "on_front":
        return f"<td data-value='{int(bool(value))}'>{'★' if value else ''}</td>"
    shown = value
    if number(value) is not None and not isinstance(value, (str, bool)):
        shown = str(value) if column in ("trial", "parent", "attempts") else format_number(value)
    kind = f" class='{escape(value)}'" if column == "state" else ""
    return f"<td{kind} data-value='{escape(text(value))}'>{escape(shown)}</td>"
