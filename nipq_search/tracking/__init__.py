"""Views of a sweep: Parquet tables and MLflow runs. Only this package imports mlflow.

Both are derived from the sweep's records and can be deleted and rebuilt; the search never reads
them. Start with `recorder.py`. Imports `records`, `file_io` and `errors`.

    tables    the results and curves tables, as pure functions of the records
    run_view  the params, tags and metrics of a trial's MLflow run, as pure functions
    runs      incremental updates of a single MLflow run
    server    the MLflow connection: address, experiment and artifacts
    recorder  keeps a server up to date with the sweep
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
    """Import a public name on first access, because pandas and mlflow are slow to load."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
