"""Images and labels in Parquet files, as data sets are published on hubs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nipq_search.errors import UserError, nearest
from nipq_search.tasks.common.package_files import files_below, needed
from nipq_search.tasks.vision.image_folder.sources import (
    Encoded,
    Found,
    Packed,
    Part,
    Wanted,
    check_classes,
    split_of,
)


def find_parquet(path: Path, wanted: Wanted, columns: tuple[str, str]) -> Found:
    """A file, or the files of a folder, whose names begin with their split's (`train-00000...`).

    Files whose names say nothing are training images where no name says `train`.

    Args:
        path: the file or folder.
        wanted: names by split.
        columns: the column of images (bytes, or a struct with `bytes`) and that of labels
            (integers or text).
    """
    files = [path]
    if path.is_dir():
        files = [file for file in files_below(path) if file.suffix == ".parquet"]
    if not files:
        raise UserError(f"{path}: no Parquet files (*.parquet) in it")
    splits: dict[str, list[Path]] = {}
    for file in files:
        split = split_of(file.relative_to(path), wanted) if path.is_dir() else None
        splits.setdefault(split or "", []).append(file)
    if "train" not in splits:
        if "" not in splits:
            raise UserError(
                f"task_args.path: {path}: holds files for {' and '.join(splits)}, and none whose "
                "name begins with 'train'"
            )
        splits["train"] = splits.pop("")
    read = {split: _read(files, columns) for split, files in splits.items() if split}
    kinds = sorted({type(label).__name__ for _, labels in read.values() for label in set(labels)})
    if len(kinds) > 1:
        raise UserError(
            f"task_args.label: {path}: column '{columns[1]}' holds {' and '.join(kinds)} in "
            "different files; labels are integers or text"
        )
    known = sorted(set(read["train"][1]))
    if kinds == ["int"] and known[0] < 0:
        raise UserError(f"{path}: column '{columns[1]}' has label {known[0]}: labels are missing")
    number = {label: index for index, label in enumerate(known)}
    classes = tuple(str(label) for label in known)
    parts = {}
    for split, (images, labels) in read.items():
        check_classes(f"{path}: {split}", map(str, set(labels)), classes)
        parts[split] = Part(
            source=Encoded(place=f"{path}: {split}", items=Packed.of(images)),
            labels=np.array([number[label] for label in labels], dtype=np.int64),
        )
    return Found(parts=parts, classes=classes)


def check_labels(file: Path, column: str, kind: Any) -> None:
    """Raise `UserError` where a column's type is neither integers nor text."""
    import pyarrow as pa

    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (
        pa.types.is_integer,
        pa.types.is_boolean,
        pa.types.is_string,
        pa.types.is_large_string,
    )
    if not any(test(inner) for test in tests):
        raise UserError(
            f"task_args.label: column '{column}' of {file} holds {kind}; labels are integers or "
            "text"
        )


def _read(files: Sequence[Path], columns: tuple[str, str]) -> tuple[list[bytes], list[Any]]:
    """Encoded images and labels of one split's files, in order."""
    with needed("task image_folder", "vision"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    if columns[0] == columns[1]:
        raise UserError("task_args.label: names the same column as task_args.image")
    images: list[bytes] = []
    labels: list[Any] = []
    for file in files:
        try:
            names = pq.read_schema(file).names
            for key, column in zip(("image", "label"), columns, strict=True):
                if names.count(column) > 1:
                    raise UserError(
                        f"task_args.{key}: {file} has {names.count(column)} columns '{column}'"
                    )
                if column not in names:
                    raise UserError(
                        f"task_args.{key}: {file} has no column '{column}'{nearest(column, names)}"
                    )
            table = pq.read_table(file, columns=list(columns))
        except PermissionError as error:
            raise UserError(f"{file}: cannot be read: permission denied") from error
        except (OSError, pa.ArrowInvalid) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{file}: cannot be read as Parquet ({reason})") from error
        if not table.num_rows:
            continue
        check_labels(file, columns[1], table.schema.field(columns[1]).type)
        column = table.column(columns[0])
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            raise UserError(
                f"task_args.image: column '{columns[0]}' of {file} holds {column.type}, not the "
                "bytes of image files"
            )
        for key, chunked in (("image", column), ("label", table.column(columns[1]))):
            if chunked.null_count:
                raise UserError(f"task_args.{key}: {file} has rows without a value in its column")
        images += column.to_pylist()
        labels += table.column(columns[1]).to_pylist()
    if not images:
        raise UserError(f"{files[0]}: no images in it")
    return images, labels
