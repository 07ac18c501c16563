"""Labelled texts from tables: CSV, TSV and Parquet files, by the names of their columns."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nipq_search.errors import nearest
from nipq_search.tasks.common.arguments import refuse
from nipq_search.tasks.common.package_files import needed, resolve_file
from nipq_search.tasks.text.files import OPENERS, read_bytes, read_text

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
"""Separator of the columns, by the end of a file's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table are read.

    Attributes:
        text: the text.
        label: its class.
        text_pair: a second text, or None.
        group: what must not be torn apart by the splits, or None.
        names: names of all columns of a file without a header line; None reads them from it.
    """

    text: str
    label: str
    text_pair: str | None = None
    group: str | None = None
    names: tuple[str, ...] | None = None

    def wanted(self) -> dict[str, str]:
        """Column by argument, of those that are set."""
        fields = ("text", "label", "text_pair", "group")
        values = {field: getattr(self, field) for field in fields}
        return {field: value for field, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One labelled text; an empty label stands for a missing one."""

    text: str
    label: str
    text_pair: str | None = None
    group: str | None = None

    @property
    def content(self) -> tuple[str, str | None]:
        """What makes two rows duplicates."""
        return self.text, self.text_pair


def read_rows(path: str, key: str, columns: Columns, encoding: str = "utf-8") -> list[Row]:
    """The rows of a table, in order; all values as text, missing ones as empty text.

    In CSV files values may be quoted and then hold commas and line breaks; in TSV files a quote
    is a character like any other. Both may be compressed (.gz, .bz2, .xz).

    Args:
        path: a file, or `package://NAME/FILE`.
        key: argument that named it, for messages.
        columns: what to read.
        encoding: of CSV and TSV files.

    Raises:
        UserError: the file is missing or damaged, or lacks a column.
    """
    file = resolve_file(path, f"task_args.{key}")
    kind = Path(file.stem).suffix if file.suffix in OPENERS else file.suffix
    with needed("reading tables", "text"):
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    try:
        if kind == ".parquet":
            table = pyarrow.parquet.read_table(pyarrow.BufferReader(read_bytes(file)))
        elif kind in SEPARATORS:
            text = read_text(file, encoding)
            if SEPARATORS[kind] == ",":
                _check_quotes(text, file, key)
            table = _read_separated(pyarrow, text, SEPARATORS[kind], columns)
        else:
            known = ", ".join([*SEPARATORS, ".parquet"])
            raise refuse(key, f"{file} is no table: its name ends in none of {known}")
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise refuse(key, f"{file} cannot be read as a table: {reason}") from error
    values: dict[str, Sequence[str]] = {}
    for argument, column in columns.wanted().items():
        if (count := table.column_names.count(column)) > 1:
            raise refuse(argument, f"{file} has {count} columns '{column}'")
        if column not in table.column_names:
            hint = nearest(column, table.column_names)
            raise refuse(argument, f"{file} has no column '{column}'{hint}")
        if argument != "group":
            kind_of = table.column(column).type
            _check_type(pyarrow, kind_of, argument, f"column '{column}' of {file}")
        values[argument] = _as_text(table.column(column).to_pylist())
    if not table.num_rows:
        raise refuse(key, f"{file} has columns and no rows")
    names = list(values)
    return [
        Row(**dict(zip(names, row, strict=True))) for row in zip(*values.values(), strict=True)
    ]


def _read_separated(pyarrow: Any, text: str, separator: str, columns: Columns) -> Any:
    """A CSV or TSV file as a table; the wanted columns are read as text, whatever they hold."""
    reader, data = pyarrow.csv, text.encode()
    # In one block no row can straddle two, and the types of a column agree.
    block = min(max(len(data), 1) + 1, 2**31 - 1)
    return reader.read_csv(
        pyarrow.BufferReader(data),
        read_options=reader.ReadOptions(column_names=columns.names, block_size=block),
        parse_options=reader.ParseOptions(
            delimiter=separator,
            quote_char='"' if separator == "," else False,
            newlines_in_values=separator == ",",
        ),
        convert_options=reader.ConvertOptions(
            column_types=dict.fromkeys(columns.wanted().values(), pyarrow.string()),
        ),
    )


def _check_type(pyarrow: Any, kind: Any, argument: str, place: str) -> None:
    """Raise `UserError` for a column of neither text nor integers: no class is called 0.5."""
    types = pyarrow.types
    inner = kind.value_type if types.is_dictionary(kind) else kind
    names = ("string", "large_string", "string_view", "integer", "boolean", "null")
    if not any(getattr(types, f"is_{name}")(inner) for name in names):
        raise refuse(argument, f"{place} holds {kind}, and not text or integers")


def _check_quotes(text: str, file: Path, key: str) -> None:
    """Raise `UserError` for a quote that is never closed: it would swallow all further rows."""
    if text.count('"') % 2 == 0:
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for _ in reader:
            line = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end of data" in str(error) or "field limit" in str(error):
            problem = f"{file}: a quote in line {line} is never closed"
            raise refuse(key, f"{problem}; close it, or write two in place of one") from error


def _as_text(values: Sequence[Any]) -> list[str]:
    return ["" if value is None else str(value) for value in values]
