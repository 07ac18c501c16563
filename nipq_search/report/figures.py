"""The registry of figures and tables, which are all called figures here.

A figure is a function from `ReportData` to an HTML fragment. To add a figure, write
`report/<name>.py` and register its function here; the tests cover every registered figure. The
script of a figure can react to the selection of a trial (`nipq.onSelect(callback)`) and select a
trial (`nipq.select(trial)`); both functions are defined in `html.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from nipq_search.registry import Registry
from nipq_search.report import bits, curves, movement, pareto, tables
from nipq_search.report.data import ReportData

FIGURES: Registry[Callable[[ReportData], str]] = Registry("figure")
"""The figures by name, in page order. A figure without data returns `""`."""

FIGURES.register("pareto", pareto.section)
FIGURES.register("bits", bits.section)
FIGURES.register("movement", movement.section)
FIGURES.register("curves", curves.section)
FIGURES.register("failures", tables.failures)
FIGURES.register("trials", tables.trials)
