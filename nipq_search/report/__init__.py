"""The HTML report: figures and tables as pure functions of a sweep's results.

Start with `html.py`. Imports `records` and `registry`.

    html      `render`, which produces the self-contained page
    figures   `FIGURES`, the registry of figures, in page order
    data      `ReportData`, the input to every figure, and shared helpers
    pareto, bits, movement, curves, tables   the figures and tables
"""

from __future__ import annotations

from nipq_search.report.data import ReportData
from nipq_search.report.figures import FIGURES
from nipq_search.report.html import render

__all__ = ["FIGURES", "ReportData", "render"]
