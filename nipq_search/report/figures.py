"""The registry of figures.

A figure is a function from `ReportData` to a piece of HTML. To add one, write `report/<name>.py`
and one line here; the tests run over the registry. A figure may follow the trial that is selected
(`nipq.onSelect(callback)`) and select one (`nipq.select(trial)`); `html` has these two.
"""

from __future__ import annotations

from collections.abc import Callable

from nipq_search.registry import Registry
from nipq_search.report import bits, curves, movement, pareto, tables
from nipq_search.report.data import ReportData

FIGURES: Registry[Callable[[ReportData], str]] = Registry("figure")
"""Figures by name, in the order of the page. One that has nothing to show returns ``""``."""

FIGURES.register("pareto", pareto.section)
FIGURES.register("bits", bits.section)
FIGURES.register("movement", movement.section)
FIGURES.register("curves", curves.section)
FIGURES.register("failures", tables.failures)
FIGURES.register("trials", tables.trials)
