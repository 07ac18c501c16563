"""The registry of figures.

A figure is a function from `ReportData` to an HTML fragment. To add one, write `report/<name>.py`
and add one line here; the tests iterate over the registry. The script of a figure can react to the
selection of a trial (`nipq.onSelect(callback)`) and select one (`nipq.select(trial)`); both are
defined in `html.py`.
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
"""Figures by name, in page order. A figure without data returns ``""``."""
