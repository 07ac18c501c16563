"""Search for images at a path: class folders, Parquet files or IDX files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nipq_search.errors import UserError
from nipq_search.tasks.vision.idx import read_idx
from nipq_search.tasks.vision.image_folder.sources import (
    SUFFIXES,
    USUAL_NAMES,
    FoundImages,
    GrayImages,
    ImageFiles,
    LabeledImages,
    PackedBytes,
    SplitNames,
    check_classes,
)

RESERVED_NAMES = {name for names in USUAL_NAMES.values() for name in names}
"""Folder names, in lower case, that denote a split and cannot be classes."""

IDX_NAMES = {"train": "train", "test": "t10k"}
"""Prefix of the names of the IDX files, by split."""


def find_images(
    path: Path, names: SplitNames, format: str | None, columns: tuple[str, str]
) -> FoundImages:
    """Find all images at a path.

    Args:
        path: a folder or a Parquet file.
        names: names to search for, by split.
        format: `folder`, `parquet` or `idx`; None detects the format.
        columns: names of the Parquet columns with the images and the labels.

    Returns:
        The images of each split.

    Raises:
        UserError: there are no images, a class folder is empty, there is only one class, the
            splits have different classes, or a column is missing.
    """
    if not path.exists():
        raise UserError(f"task_args.path: {path}: no such file or folder")
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(
            f"task_args.path: {path}: give a folder, or a Parquet file whose name ends in .parquet"
        )
    kind = format or guess_format(path)
    if kind == "parquet":
        from nipq_search.tasks.vision.image_folder.parquet import find_parquet

        found = find_parquet(path, names, columns)
    elif not path.is_dir():
        raise UserError(f"task_args.path: {path}: format {kind} requires a folder")
    else:
        found = find_folders(path, names) if kind == "folder" else find_idx(path, names)
    if len(found.classes) < 2:
        raise UserError(
            f"task_args.path: {path}: there is only one class, {found.classes[0]!r}; at least two "
            "are needed"
        )
    return found


def guess_format(path: Path) -> str:
    """Return `parquet`, `idx` or `folder`, depending on the names of the files."""
    if path.is_file() or any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
        return "parquet"
    return "idx" if any(path.glob("*-idx3-ubyte*")) else "folder"


def find_folders(path: Path, names: SplitNames) -> FoundImages:
    """Find class folders, either below one folder per split or directly in `path`.

    Raises:
        UserError: a class folder is empty or has the name of a split, or the splits have
            different classes.
    """
    places = {split: split_folder(path, known) for split, known in names.items()}
    direct = places["train"] is None
    if direct:
        places = {"train": path}
    trees = {split: list_classes(place) for split, place in places.items() if place is not None}
    classes = tuple(trees["train"])
    reserved = [name for name in classes if name.lower() in RESERVED_NAMES]
    if reserved and (direct or len(reserved) == len(classes)):
        raise UserError(
            f"task_args.path: {places['train']}: '{reserved[0]}' is the name of a split, not of a "
            "class, and there is no folder 'train'; create it for the training images"
        )
    splits = {}
    for split, tree in trees.items():
        check_classes(str(places[split]), tree, classes)
        splits[split] = LabeledImages(
            source=ImageFiles(
                folder=str(places[split]),
                paths=PackedBytes.of([name for files in tree.values() for name in files]),
            ),
            labels=np.repeat(np.arange(len(classes)), [len(files) for files in tree.values()]),
        )
    return FoundImages(splits=splits, classes=classes)


def split_folder(path: Path, names: Sequence[str]) -> Path | None:
    """Return the folder in `path` that has one of the names, in order of preference.

    Names are compared without regard to case.

    Raises:
        UserError: two folders differ only in case.
    """
    folders = [entry.name for entry in os.scandir(path) if entry.is_dir()]
    for name in names:
        found = sorted(folder for folder in folders if folder.lower() == name.lower())
        if len(found) > 1:
            raise UserError(
                f"task_args.path: {path}: '{found[0]}' and '{found[1]}' differ only in case; "
                "rename one of them"
            )
        if found:
            return path / found[0]
    return None


def list_classes(folder: Path) -> dict[str, list[bytes]]:
    """Return the image files in each class folder, relative to `folder` and sorted.

    A class folder can be a link. Links to folders inside it are not followed, because they can
    form a cycle. Names that start with a dot are ignored.

    Raises:
        UserError: there is no class folder, or a class folder contains no images.
        PermissionError: a folder cannot be read.
    """
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    classes = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    if not classes:
        raise UserError(f"{folder}: no class folders; create one folder of images per class")
    tree = {}
    for name in classes:
        files = []
        for place, folders, found in os.walk(folder / name, onerror=_raise):
            folders[:] = sorted(inner for inner in folders if inner[0] != ".")
            inside = os.path.relpath(place, folder)
            images = sorted(f for f in found if f.lower().endswith(SUFFIXES) and f[0] != ".")
            files += [os.fsencode(os.path.join(inside, file)) for file in images]
        if not files:
            raise UserError(f"{folder / name}: no images in this class folder; remove or fill it")
        tree[name] = files
    return tree


def _raise(error: OSError) -> None:
    raise error


def find_idx(path: Path, names: SplitNames) -> FoundImages:
    """Read IDX files, compressed or plain, that are named like those of the MNIST family.

    The test files are read only if `names` contains names for the test split.

    Raises:
        UserError: a file is missing or invalid, or the splits have different classes.
    """
    prefixes = {split: prefix for split, prefix in IDX_NAMES.items() if names[split]}
    splits = {split: read_idx_pair(path, prefix) for split, prefix in prefixes.items()}
    classes = [str(label) for label in range(int(splits["train"].labels.max(initial=0)) + 1)]
    for split, images in splits.items():
        check_classes(f"{path}: {split}", map(str, np.unique(images.labels)), classes)
    return FoundImages(splits=splits, classes=tuple(classes))


def read_idx_pair(folder: Path, prefix: str) -> LabeledImages:
    """Read the images and labels of one split.

    Raises:
        UserError: a file is missing or invalid, or the numbers of images and labels differ.
    """

    def file(rest: str) -> Path:
        places = [folder / f"{prefix}-{rest}{suffix}" for suffix in (".gz", "")]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise UserError(f"{places[1]}: no such file, compressed or not")
        return found

    images = read_idx(file("images-idx3-ubyte"), 3)
    labels = read_idx(file("labels-idx1-ubyte"), 1).astype(np.int64)
    if len(images) != len(labels):
        raise UserError(f"{folder}: {prefix} has {len(labels)} labels for {len(images)} images")
    return LabeledImages(source=GrayImages(images=images), labels=labels)
