"""Finds the images at a path: class folders, Parquet files or IDX files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nipq_search.errors import UserError
from nipq_search.tasks.vision.idx import read_idx
from nipq_search.tasks.vision.image_folder.sources import (
    NAMES,
    SUFFIXES,
    Files,
    Found,
    Grey,
    Packed,
    Part,
    Wanted,
    check_classes,
)

SPLIT_NAMES = {name for names in NAMES.values() for name in names}
"""What no class is called: such folders are splits."""


def find(path: Path, wanted: Wanted, format: str | None, columns: tuple[str, str]) -> Found:
    """Everything at `path`, in the named format or in the one that it looks like.

    Raises:
        UserError: nothing there, no images, an empty class folder, one class alone, other classes
            in another split, missing columns.
    """
    if not path.exists():
        raise UserError(f"task_args.path: {path}: no such file or folder")
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(
            f"task_args.path: {path}: give a folder, or a Parquet file (its name ends in .parquet)"
        )
    kind = format or guess_format(path)
    if kind == "parquet":
        from nipq_search.tasks.vision.image_folder.parquet import find_parquet

        found = find_parquet(path, wanted, columns)
    elif not path.is_dir():
        raise UserError(f"task_args.path: {path}: not a folder, as format {kind} needs one")
    else:
        found = find_folders(path, wanted) if kind == "folder" else find_idx(path, wanted)
    if len(found.classes) < 2:
        raise UserError(
            f"task_args.path: {path}: there is one class, {found.classes[0]!r}; two are needed"
        )
    return found


def guess_format(path: Path) -> str:
    """`parquet`, `idx` or `folder`, from the names of the files."""
    if path.is_file() or any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
        return "parquet"
    return "idx" if any(path.glob("*-idx3-ubyte*")) else "folder"


def find_folders(path: Path, wanted: Wanted) -> Found:
    """A tree of class folders, below a folder for each split or directly at `path`."""
    places = {split: split_folder(path, names) for split, names in wanted.items()}
    direct = places["train"] is None
    if direct:
        places = {"train": path}
    trees = {split: scan(place) for split, place in places.items() if place is not None}
    classes = tuple(trees["train"])
    splits = [name for name in classes if name.lower() in SPLIT_NAMES]
    if splits and (direct or len(splits) == len(classes)):
        raise UserError(
            f"task_args.path: {places['train']}: '{splits[0]}' is the name of a split, not of a "
            "class, and there is no folder 'train' beside it; name the training images' so"
        )
    parts = {}
    for split, tree in trees.items():
        check_classes(str(places[split]), tree, classes)
        parts[split] = Part(
            source=Files(
                folder=str(places[split]),
                paths=Packed.of([name for names in tree.values() for name in names]),
            ),
            labels=np.repeat(np.arange(len(classes)), [len(names) for names in tree.values()]),
        )
    return Found(parts=parts, classes=classes)


def split_folder(path: Path, names: Sequence[str]) -> Path | None:
    """The folder in `path` that has one of the names, in any case; the first name counts most.

    Raises:
        UserError: two folders differ in case alone.
    """
    folders = [entry.name for entry in os.scandir(path) if entry.is_dir()]
    for name in names:
        found = sorted(folder for folder in folders if folder.lower() == name.lower())
        if len(found) > 1:
            raise UserError(
                f"task_args.path: {path}: '{found[0]}' and '{found[1]}' are both there; which is "
                "it? Rename one"
            )
        if found:
            return path / found[0]
    return None


def scan(folder: Path) -> dict[str, list[bytes]]:
    """Image files below each class folder, by class, relative to `folder`; all sorted.

    A class folder may be a link. Links to folders inside of it are not followed, for they may lead
    in a circle. What begins with a dot is left out.

    Raises:
        UserError: no class folder, or one without images.
        PermissionError: something below may not be read.
    """
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    classes = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    if not classes:
        raise UserError(f"{folder}: no class folders; it needs one folder of images per class")
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


def find_idx(path: Path, wanted: Wanted) -> Found:
    """A folder of IDX files named as in the MNIST family, compressed or plain."""
    names = {split: name for split, name in IDX_NAMES.items() if wanted[split]}
    parts = {split: read_idx_pair(path, name) for split, name in names.items()}
    classes = [str(label) for label in range(int(parts["train"].labels.max(initial=0)) + 1)]
    for split, part in parts.items():
        check_classes(f"{path}: {split}", map(str, np.unique(part.labels)), classes)
    return Found(parts=parts, classes=tuple(classes))


IDX_NAMES = {"train": "train", "test": "t10k"}
"""What the files of a split begin with."""


def read_idx_pair(folder: Path, name: str) -> Part:
    """Images and labels of one split, checked against each other."""

    def file(rest: str) -> Path:
        places = [folder / f"{name}-{rest}{suffix}" for suffix in (".gz", "")]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise UserError(f"{places[1]}: no such file, compressed or not")
        return found

    images = read_idx(file("images-idx3-ubyte"), 3)
    labels = read_idx(file("labels-idx1-ubyte"), 1).astype(np.int64)
    if len(images) != len(labels):
        raise UserError(f"{folder}: {name} has {len(labels)} labels for {len(images)} images")
    return Part(source=Grey(images=images), labels=labels)
