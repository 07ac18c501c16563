"""Tables of labeled texts in CSV, TSV and Parquet files, and the argument section for a table."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nipq_search.errors import nearest
from nipq_search.tasks.common.arguments import argument_error, flag, names, paths, text_or_integer
from nipq_search.tasks.common.extras import requires_extra
from nipq_search.tasks.common.package_files import resolve_file
from nipq_search.tasks.common.sections import store
from nipq_search.tasks.text.files import DECOMPRESSORS, read_bytes, read_text

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
"""Column separators by file suffix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table of labeled texts, and which of its columns and rows are used.

    Attributes:
        path: CSV, TSV or Parquet file, plain or compressed, or `package://PACKAGE/FILE`.
        text: name of the column with the text.
        label: name of the column with the class.
        text_pair: name of the column with the second text of a pair.
        group: name of a column by which rows are grouped; a group is never divided among splits.
        labels: the classes, in order; rows with other labels are dropped. None uses all labels,
            sorted.
        deduplicate: whether to keep only the first occurrence of each text, across all splits.
        columns: for a file without a header line, the names of all its columns.
        encoding: encoding of a CSV or TSV file.
    """

    path: str
    text: str
    label: str
    text_pair: str | None = None
    group: str | None = None
    labels: Sequence[str] | None = None
    deduplicate: bool = True
    columns: Sequence[str] | None = None
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        """Check every argument and make `path` absolute."""
        (path,) = paths("path", [self.path])
        store(
            self,
            path=path,
            text=text_or_integer("text", self.text),
            label=text_or_integer("label", self.label),
            text_pair=None
            if self.text_pair is None
            else text_or_integer("text_pair", self.text_pair),
            group=None if self.group is None else text_or_integer("group", self.group),
            labels=names("labels", self.labels),
            deduplicate=flag("deduplicate", self.deduplicate),
            columns=names("columns", self.columns),
            encoding=text_or_integer("encoding", self.encoding),
        )

    def used_columns(self) -> dict[str, str]:
        """Return the names of the columns to read, by argument."""
        keys = ("text", "label", "text_pair", "group")
        values = {key: getattr(self, key) for key in keys}
        return {key: value for key, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A labeled text or pair of texts; an empty `label` means that the label is missing."""

    text: str
    label: str
    text_pair: str | None = None
    group: str | None = None

    @property
    def content(self) -> tuple[str, str | None]:
        """The text or pair of texts; rows with equal contents are duplicates."""
        return self.text, self.text_pair


def read_rows(table: TextTable, path: str | None = None, key: str = "path") -> list[Row]:
    """Read the rows of a table in order; values become text, and missing values become `""`.

    Quoted values of CSV files can contain commas and line breaks; TSV files have no quoting. Files
    can be compressed (.gz, .bz2, .xz).

    Args:
        table: columns and encoding, and the file if `path` is None.
        path: a different file with the same columns, or `package://NAME/FILE`.
        key: name of the argument that contains the path, for messages.

    Returns:
        The rows, at least one.

    Raises:
        UserError: the file is missing or damaged, or lacks a column.
    """
    file = resolve_file(path or table.path, f"task_args.{key}")
    with requires_extra("reading tables", "text"):
        import pyarrow  # noqa: F401
    data = _read_file(file, key, table)
    values: dict[str, Sequence[str]] = {}
    for argument, column in table.used_columns().items():
        if (count := data.column_names.count(column)) > 1:
            raise argument_error(argument, f"{file} has {count} columns '{column}'")
        if column not in data.column_names:
            hint = nearest(column, data.column_names)
            raise argument_error(argument, f"{file} has no column '{column}'{hint}")
        if argument != "group":
            _check_type(data.column(column).type, argument, f"column '{column}' of {file}")
        values[argument] = _as_text(data.column(column).to_pylist())
    if not data.num_rows:
        raise argument_error(key, f"{file} has columns but no rows")
    names = list(values)
    return [
        Row(**dict(zip(names, row, strict=True))) for row in zip(*values.values(), strict=True)
    ]


def _read_file(file: Path, key: str, table: TextTable) -> Any:
    """Read a file into a pyarrow table."""
    import pyarrow
    import pyarrow.parquet

    kind = Path(file.stem).suffix if file.suffix in DECOMPRESSORS else file.suffix
    try:
        if kind == ".parquet":
            return pyarrow.parquet.read_table(pyarrow.BufferReader(read_bytes(file)))
        if kind in SEPARATORS:
            text = read_text(file, table.encoding)
            if SEPARATORS[kind] == ",":
                _check_quotes(text, file, key)
            return _read_separated(text, SEPARATORS[kind], table)
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise argument_error(key, f"{file} cannot be read as a table: {reason}") from error
    known = ", ".join([*SEPARATORS, ".parquet"])
    raise argument_error(key, f"{file} is not a table: its name must end in one of {known}")


def _read_separated(text: str, separator: str, table: TextTable) -> Any:
    """Parse the text of a CSV or TSV file into a pyarrow table; the used columns become text."""
    import pyarrow
    from pyarrow import csv as reader

    data = text.encode()
    # With a single block, no row crosses a block boundary, and each column has a single type.
    block = min(max(len(data), 1) + 1, 2**31 - 1)
    return reader.read_csv(
        pyarrow.BufferReader(data),
        read_options=reader.ReadOptions(column_names=table.columns, block_size=block),
        parse_options=reader.ParseOptions(
            delimiter=separator,
            quote_char='"' if separator == "," else False,
            newlines_in_values=separator == ",",
        ),
        convert_options=reader.ConvertOptions(
            column_types=dict.fromkeys(table.used_columns().values(), pyarrow.string()),
        ),
    )


def _check_type(kind: Any, argument: str, place: str) -> None:
    """Raise `UserError` unless a column contains text, integers or Booleans."""
    from pyarrow import types

    inner = kind.value_type if types.is_dictionary(kind) else kind
    names = ("string", "large_string", "string_view", "integer", "boolean", "null")
    if not any(getattr(types, f"is_{name}")(inner) for name in names):
        raise argument_error(argument, f"{place} contains {kind}, not text or integers")


def _check_quotes(text: str, file: Path, key: str) -> None:
    """Raise `UserError` for an unclosed quote, which would swallow all rows after it."""
    if text.count('"') % 2 == 0:
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for _ in reader:
            line = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end of data" in str(error) or "field limit" in str(error):
            problem = f"{file}: the quote on line {line} is not closed"
            raise argument_error(
                key, f"{problem}; close it, or double it to keep it as a character"
            ) from error


def _as_text(values: Sequence[Any]) -> list[str]:
    """Convert values to strings; None becomes an empty string."""
    return ["" if value is None else str(value) for value in values]
