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
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"{path}: cannot be read: {reason}") from error
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


def check_classes(place: str, found: Iterable[str], classes: Sequence[str]) -> None:
    """Raise `UserError` where a split does not have exactly the classes of the training images."""
    missing, more = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
    if missing or more:
        said = [f"lacks class {missing[0]!r}"] if missing else []
        said += [f"has class {more[0]!r}, which the training images lack"] if more else []
        raise UserError(f"{place}: {' and '.join(said)}; every split needs the same classes")


def split_of(relative: Path, wanted: Wanted) -> str | None:
    """The split that a file's name, or else that of a folder above it, begins with."""
    for name in reversed(relative.parts):
        word = re.split(r"[^A-Za-z]", name, maxsplit=1)[0].lower()
        for split, names in wanted.items():
            if word in names or name.lower().partition(".")[0] in [n.lower() for n in names]:
                return split
    return None
