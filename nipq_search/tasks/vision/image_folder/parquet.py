"""Images and labels in Parquet files, the format of many published datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nipq_search.errors import UserError, nearest
from nipq_search.tasks.common.extras import requires_extra
from nipq_search.tasks.common.package_files import list_files
from nipq_search.tasks.vision.image_folder.sources import (
    EncodedImages,
    FoundImages,
    LabeledImages,
    PackedBytes,
    SplitNames,
    check_classes,
    split_of,
)


def find_parquet(path: Path, names: SplitNames, columns: tuple[str, str]) -> FoundImages:
    """Read a Parquet file, or a folder of files whose paths indicate their splits.

    `split_of` defines how a path indicates a split. Files whose paths indicate no split contain
    the training images; they are ignored if the paths of other files indicate the `train` split.

    Args:
        path: the file or folder.
        names: names to search for, by split.
        columns: name of the column with the images (bytes, or a struct with `bytes`), and name of
            the column with the labels (integers or text).

    Returns:
        The images of each split, still encoded.

    Raises:
        UserError: a file, a column or the training images are missing, or values are invalid.
    """
    splits = {
        split: _read(files, columns)
        for split, files in _files_by_split(path, names).items()
        if split
    }
    kinds = sorted({type(label).__name__ for _, found in splits.values() for label in set(found)})
    if len(kinds) > 1:
        raise UserError(
            f"task_args.label: {path}: column '{columns[1]}' contains {' and '.join(kinds)} in "
            "different files; labels must be all integers or all text"
        )
    known = sorted(set(splits["train"][1]))
    if kinds == ["int"] and known[0] < 0:
        raise UserError(f"{path}: column '{columns[1]}' has label {known[0]}: labels are missing")
    number = {label: index for index, label in enumerate(known)}
    classes = tuple(str(label) for label in known)
    labeled = {}
    for split, (images, labels) in splits.items():
        check_classes(f"{path}: {split}", map(str, set(labels)), classes)
        labeled[split] = LabeledImages(
            source=EncodedImages(origin=f"{path}: {split}", items=PackedBytes.of(images)),
            labels=np.array([number[label] for label in labels], dtype=np.int64),
        )
    return FoundImages(splits=labeled, classes=classes)


def _files_by_split(path: Path, names: SplitNames) -> dict[str, list[Path]]:
    """Return the Parquet files by split, and files that belong to no split under an empty name."""
    files = [path]
    if path.is_dir():
        files = [file for file in list_files(path) if file.suffix == ".parquet"]
    if not files:
        raise UserError(f"{path}: no Parquet files (*.parquet) in it")
    splits: dict[str, list[Path]] = {}
    for file in files:
        split = split_of(file.relative_to(path), names) if path.is_dir() else None
        splits.setdefault(split or "", []).append(file)
    if "train" not in splits:
        if "" not in splits:
            raise UserError(
                f"task_args.path: {path}: has files for {' and '.join(splits)}, but none whose "
                "name begins with 'train'"
            )
        splits["train"] = splits.pop("")
    return splits


def _read(files: Sequence[Path], columns: tuple[str, str]) -> tuple[list[bytes], list[Any]]:
    """Return the encoded images and the labels of one split's files, in order."""
    with requires_extra("task image_folder", "vision"):
        import pyarrow as pa
    if columns[0] == columns[1]:
        raise UserError("task_args.label: names the same column as task_args.image")
    images: list[bytes] = []
    labels: list[Any] = []
    for file in files:
        table = _read_table(file, columns)
        if not table.num_rows:
            continue
        check_labels(file, columns[1], table.schema.field(columns[1]).type)
        column = table.column(columns[0])
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            raise UserError(
                f"task_args.image: column '{columns[0]}' of {file} contains {column.type}, not "
                "the bytes of image files"
            )
        for key, chunked in (("image", column), ("label", table.column(columns[1]))):
            if chunked.null_count:
                raise UserError(f"task_args.{key}: {file} has rows without a value in this column")
        images += column.to_pylist()
        labels += table.column(columns[1]).to_pylist()
    if not images:
        raise UserError(f"{files[0]}: contains no images")
    return images, labels


def _read_table(file: Path, columns: tuple[str, str]) -> Any:
    """Return the columns with the images and labels of a file as a pyarrow table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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
        return pq.read_table(file, columns=list(columns))
    except PermissionError as error:
        raise UserError(f"{file}: cannot be read: permission denied") from error
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{file}: cannot be read as Parquet ({reason})") from error


def check_labels(file: Path, column: str, kind: Any) -> None:
    """Check the type of the column with the labels.

    Args:
        file: the file, for messages.
        column: name of the column.
        kind: pyarrow type of the column.

    Raises:
        UserError: the type is neither integer, Boolean nor text.
    """
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
            f"task_args.label: column '{column}' of {file} contains {kind}; labels must be "
            "integers or text"
        )
