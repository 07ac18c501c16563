"""The registry of figures.

A figure is a function from `ReportData` to a piece of HTML. To add one, write `report/<name>.py`
and one line here; the tests run over the registry. A figure may follow the trial that is selected
(`nipq.onSelect(callback)`) and select one (`nipq.select(trial)`); `html` has these two.
"""

from __future__ import annotations

from collections.abc import Callable

from nipq_search.report import bits, curves, movement, pareto, tables
from nipq_search.report.data import ReportData

FIGURES: dict[str, Callable[[ReportData], str]] = {
    "pareto": pareto.section,
    "bits": bits.section,
    "movement": movement.section,
    "curves": curves.section,
    "failures": tables.failures,
    "trials": tables.trials,
}
"""Figures by name, in the order of the page. One that has nothing to show returns ``""``."""
