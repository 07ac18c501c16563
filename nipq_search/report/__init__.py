"""The report: figures and tables as pure functions of a sweep's results, in one HTML page.

data      what every figure gets, and the helpers that figures share
html      `render`: the page, self-contained, without a network
figures   `FIGURES`: the registry of figures, in the order of the page
pareto, bits, curves, tables   one figure each
"""

from __future__ import annotations

from nipq_search.report.data import ReportData
from nipq_search.report.figures import FIGURES
from nipq_search.report.html import render

__all__ = ["FIGURES", "ReportData", "render"]
