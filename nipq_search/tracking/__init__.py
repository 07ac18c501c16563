"""What a sweep leaves for people: tables on disk and runs in MLflow. The only importer of mlflow.

Both are projections of the sweep's own records. They can be deleted and built again, so nothing
in the search ever reads them back to decide something.

    tables      results.parquet and curves.parquet as pure functions of the records
    projection  what one trial looks like as an MLflow run, as pure functions
    server      the MLflow connection: where it is, its experiment, its artifacts
    recorder    brings a server up to date with the sweep, again and again
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nipq_search.tracking.recorder import MlflowRecorder
    from nipq_search.tracking.tables import curves_table, read_table, results_table, write_table

_HOME = {
    "MlflowRecorder": "recorder",
    "curves_table": "tables",
    "read_table": "tables",
    "results_table": "tables",
    "write_table": "tables",
}

__all__ = ["MlflowRecorder", "curves_table", "read_table", "results_table", "write_table"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: pandas and mlflow are slow to load."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
