"""Where images come from: class folders, IDX files or encoded bytes, opened one at a time."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from nipq_search.errors import UserError
from nipq_search.tasks.idx import read_idx

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
"""File names that are taken for images, in any case."""

NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
"""What folders and files of a split are called, in order of preference."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Many byte strings in one array: two numpy arrays cost no copies between processes."""

    data: NDArray[np.uint8]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, items: Sequence[bytes]) -> Packed:
        """The items, one behind the other."""
        ends = np.cumsum([len(item) for item in items], dtype=np.int64)
        return cls(data=np.frombuffer(b"".join(items), dtype=np.uint8), ends=ends)

    def __len__(self) -> int:
        """Number of items."""
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        """One item."""
        start = self.ends[index - 1] if index else 0
        return self.data[start : self.ends[index]].tobytes()


class Source(Protocol):
    """Images by number."""

    def open(self, index: int) -> Image:
        """The decoded image; `UserError` names one that cannot be read."""
        ...

    def fingerprint(self) -> bytes:
        """Tells other data apart, as far as that takes no reading of every image."""
        ...


@dataclass(frozen=True, kw_only=True)
class Files:
    """Image files below a folder. Only their names travel to other processes."""

    folder: str
    paths: Packed

    def open(self, index: int) -> Image:
        """The decoded file."""
        path = os.path.join(self.folder, os.fsdecode(self.paths[index]))
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        return decode(data, path)

    def fingerprint(self) -> bytes:
        """Names of the files."""
        return self.paths.data.tobytes()


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Encoded images in memory; `place` says where they were read."""

    place: str
    items: Packed

    def open(self, index: int) -> Image:
        """The decoded image."""
        return decode(self.items[index], f"{self.place}: image {index}")

    def fingerprint(self) -> bytes:
        """Every byte."""
        return hashlib.sha256(self.items.data.data).digest()


@dataclass(frozen=True, kw_only=True)
class Grey:
    """Grey images (N, H, W) of one size in memory."""

    images: NDArray[np.uint8]

    def open(self, index: int) -> Image:
        """The image, in mode L."""
        from PIL import Image

        return Image.fromarray(self.images[index])

    def fingerprint(self) -> bytes:
        """Every byte."""
        return hashlib.sha256(np.ascontiguousarray(self.images).data).digest()


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images and their class numbers (N,)."""

    source: Source
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a path holds: parts by split (`train` at least), and the classes' names in order."""

    parts: Mapping[str, Part]
    classes: tuple[str, ...]


Wanted = Mapping[str, Sequence[str]]
"""Names to look for by split; none where a share of the training images is taken instead."""


def decode(data: bytes, name: str) -> Image:
    """The image in `data`, grey or RGB; `UserError` with its `name` where it is none."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data))
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable image; replace or remove it") from error


def find(path: Path, wanted: Wanted, format: str | None, columns: tuple[str, str]) -> Found:
    """Everything at `path`, in the named format or in the one that it looks like.

    Raises:
        UserError: nothing there, no images, an empty class folder, other classes in another
            split, missing columns.
    """
    if not path.exists():
        raise UserError(f"task_args.path: {path}: no such file or folder")
    kind = format or guess_format(path)
    if kind == "parquet":
        from nipq_search.tasks.image_parquet import find_parquet

        return find_parquet(path, wanted, columns)
    if not path.is_dir():
        raise UserError(f"task_args.path: {path}: not a folder, as format {kind} needs one")
    return find_folders(path, wanted) if kind == "folder" else find_idx(path, wanted)


def guess_format(path: Path) -> str:
    """`parquet`, `idx` or `folder`, from the names of the files."""
    if path.is_file() or any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
        return "parquet"
    return "idx" if any(path.glob("*-idx3-ubyte*")) else "folder"


def find_folders(path: Path, wanted: Wanted) -> Found:
    """A tree of class folders, below a folder for each split or directly at `path`."""
    places = {
        split: next((path / name for name in names if (path / name).is_dir()), None)
        for split, names in wanted.items()
    }
    if places["train"] is None:
        places = {"train": path}
    trees = {split: scan(place) for split, place in places.items() if place is not None}
    classes = tuple(trees["train"])
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


def scan(folder: Path) -> dict[str, list[bytes]]:
    """Image files below each class folder, by class, relative to `folder`; all sorted.

    Raises:
        UserError: no class folder, or one without images.
    """
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    classes = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    if not classes:
        raise UserError(f"{folder}: no class folders; it needs one folder of images per class")
    tree = {}
    for name in classes:
        files = []
        for place, folders, found in os.walk(folder / name, followlinks=True):
            folders.sort()
            inside = os.path.relpath(place, folder)
            images = sorted(file for file in found if file.lower().endswith(SUFFIXES))
            files += [os.fsencode(os.path.join(inside, file)) for file in images]
        if not files:
            raise UserError(f"{folder / name}: no images in this class folder; remove or fill it")
        tree[name] = files
    return tree


def check_classes(place: str, found: Iterable[str], classes: Sequence[str]) -> None:
    """Raise `UserError` where a split does not have exactly the classes of the training images."""
    missing, more = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
    if missing or more:
        said = [f"lacks class {missing[0]!r}"] if missing else []
        said += [f"has class {more[0]!r}, which the training images lack"] if more else []
        raise UserError(f"{place}: {' and '.join(said)}; every split needs the same classes")


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


def split_of(relative: Path, wanted: Wanted) -> str | None:
    """The split that a file's name, or else that of a folder above it, begins with."""
    for name in reversed(relative.parts):
        word = re.split(r"[^A-Za-z]", name, maxsplit=1)[0].lower()
        for split, names in wanted.items():
            if word in names or name.partition(".")[0] in names:
                return split
    return None
