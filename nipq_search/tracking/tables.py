"""Results and curves tables: conversion of records to data frames, stored as Parquet files.

The tables are flat, so that any Parquet reader can use them: each mapping in a record becomes one
column per key, prefixed with the mapping's name. Every column has a single type. An empty table
has the same fixed columns and types as a full one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipq_search.errors import UserError
from nipq_search.file_io import write_bytes
from nipq_search.records import CurvePoint, TrialRecord

if TYPE_CHECKING:
    import pandas as pd

INTEGER, REAL, TRUTH, TEXT, TIME = "Int64", "float64", "bool", "string", "datetime64[us, UTC]"
"""Column types. `INTEGER` is nullable; the records store `TIME` as Unix seconds."""

RESULTS = {
    "trial": "int64",
    "state": TEXT,
    "reason": TEXT,
    "budget_label": TEXT,
    "budget": TEXT,
    "validation": REAL,
    "test": REAL,
    "on_front": TRUTH,
    "samples": "int64",
    "seconds": REAL,
    "parent": INTEGER,
    "attempts": "int64",
    "seed": "int64",
    "threads": "int64",
    "started": TIME,
    "ended": TIME,
    "strategy": TEXT,
    "folder": TEXT,
}
"""Fixed columns of the results table, in order. `budget` is JSON text."""

CURVES = {"trial": "int64", "epoch": "int64", "step": "int64", "phase": TEXT, "timestamp": TIME}
"""Fixed columns of the curves table, in order."""


def results_table(records: Sequence[TrialRecord]) -> pd.DataFrame:
    """Return the results table, with one row per trial, sorted by trial number.

    In addition to the fixed columns (`RESULTS`), the table has columns `budget_<cost>`,
    `params_<name>`, `metrics_<name>` and `cost_<name>`, with missing values for trials without
    the entry. Hyperparameters keep their type if it is the same in all trials; integers mixed
    with floats become floats, and any other mixture is stored as JSON text.
    """
    records = sorted(records, key=lambda record: record.trial)
    fixed = {name: [getattr(record, name) for record in records] for name in RESULTS}
    fixed["budget"] = [json.dumps(dict(record.budget)) for record in records]
    groups = {
        "budget": [record.budget for record in records],
        "params": [record.params for record in records],
        "metrics": [record.metrics for record in records],
        "cost": [record.cost for record in records],
    }
    return _frame(fixed, RESULTS, groups)


def curves_table(curves: Mapping[int, Sequence[CurvePoint]]) -> pd.DataFrame:
    """Return the curves table: one row per trial and epoch, sorted by both.

    In addition to the fixed columns (`CURVES`), the table has columns `metrics_<name>`.

    An epoch that was repeated after a crash appears once, with its first measurement. Training
    resumes bit-exactly, so both measurements are equal.
    """
    rows: dict[tuple[int, int], CurvePoint] = {}
    for trial in sorted(curves):
        for point in sorted(curves[trial], key=lambda point: (point.epoch, point.timestamp)):
            rows.setdefault((trial, point.epoch), point)
    points = list(rows.values())
    fixed: dict[str, list[Any]] = {"trial": [trial for trial, _ in rows]}
    for name in ("epoch", "step", "phase", "timestamp"):
        fixed[name] = [getattr(point, name) for point in points]
    return _frame(fixed, CURVES, {"metrics": [point.metrics for point in points]})


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write `frame` to a Parquet file atomically; `read_table` reads it.

    Raises:
        OSError: the folder is not writable; an existing file is left unchanged.
    """
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    write_bytes(path, buffer.getvalue())


def read_table(path: Path) -> pd.DataFrame:
    """Read a table that `write_table` wrote.

    Raises:
        UserError: the file is missing, unreadable or not a Parquet file.
    """
    import pandas as pd
    import pyarrow

    try:
        # Given a path, pandas would open the file twice, and a driver may replace it in between.
        with path.open("rb") as file:
            return pd.read_parquet(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is the folder a sweep?") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path}: not a Parquet table ({error}); delete it and run the sweep's command again"
        ) from None


def _frame(
    fixed: Mapping[str, list[Any]],
    types: Mapping[str, str],
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
) -> pd.DataFrame:
    """Join fixed columns with one column per key of each group of mappings."""
    import pandas as pd

    columns = {name: _column(fixed[name], kind) for name, kind in types.items()}
    for prefix, mappings in groups.items():
        for key in _keys(mappings):
            values = [mapping.get(key) for mapping in mappings]
            kind = _type(values) if prefix == "params" else REAL
            columns[f"{prefix}_{key}"] = _column(values, kind)
    return pd.DataFrame(columns)


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys of all mappings, in order of first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _type(values: Iterable[Any]) -> str:
    """Return the column type for the values; `object` if they must become JSON text."""
    present = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in present):
        return "boolean" if present else TEXT
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in present):
        return INTEGER if all(isinstance(value, int) for value in present) else REAL
    return TEXT if all(isinstance(value, str) for value in present) else "object"


def _column(values: list[Any], kind: str) -> pd.Series:
    """Convert values to a typed column; missing values remain missing."""
    import pandas as pd

    if kind == TIME:
        seconds = pd.Series(values, dtype="float64")
        return pd.to_datetime(seconds, unit="s", utc=True).astype("datetime64[us, UTC]")
    if kind == "object":
        texts = [None if value is None else json.dumps(value, default=str) for value in values]
        return pd.Series(texts, dtype=TEXT)
    return pd.Series(values, dtype=kind)
