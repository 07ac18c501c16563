"""Sources of images: files in class folders, IDX arrays or encoded bytes, opened one by one.

To add a format, write a function that returns `FoundImages`, like `find_parquet` in `parquet.py`,
and call it in `find_images` in `search.py`.
"""

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
"""Suffixes of image files, in lower case; file names are matched case-insensitively."""

USUAL_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Usual names of the folders and files of each split, in order of preference."""


@dataclass(frozen=True, kw_only=True)
class PackedBytes:
    """A sequence of byte strings in two numpy arrays, which processes can share without copying.

    Attributes:
        data: the concatenated byte strings.
        ends: end of each byte string in `data`.
    """

    data: NDArray[np.uint8]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, items: Sequence[bytes]) -> PackedBytes:
        """Concatenate byte strings."""
        ends = np.cumsum([len(item) for item in items], dtype=np.int64)
        return cls(data=np.frombuffer(b"".join(items), dtype=np.uint8), ends=ends)

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        """Return one item."""
        start = self.ends[index - 1] if index else 0
        return self.data[start : self.ends[index]].tobytes()


class ImageSource(Protocol):
    """A sequence of images."""

    def open(self, index: int) -> Image:
        """Return a decoded image, or raise `UserError` with its name if it cannot be read."""
        ...

    def fingerprint(self) -> bytes:
        """Return bytes that change with the data, without reading every image file."""
        ...


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Image files below a folder. A pickled object contains the file names but no images."""

    folder: str
    paths: PackedBytes

    def open(self, index: int) -> Image:
        """Return the decoded image in a file."""
        path = os.path.join(self.folder, os.fsdecode(self.paths[index]))
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"{path}: cannot be read: {reason}") from error
        return decode(data, path)

    def fingerprint(self) -> bytes:
        """Return the names of the files."""
        return self.paths.data.tobytes()


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """Encoded images in memory; `origin` identifies their file in messages."""

    origin: str
    items: PackedBytes

    def open(self, index: int) -> Image:
        """Return a decoded image."""
        return decode(self.items[index], f"{self.origin}: image {index}")

    def fingerprint(self) -> bytes:
        """Return a hash of all bytes."""
        return hashlib.sha256(self.items.data.data).digest()


@dataclass(frozen=True, kw_only=True)
class GrayImages:
    """Grayscale images (N, H, W) of equal size in memory."""

    images: NDArray[np.uint8]

    def open(self, index: int) -> Image:
        """Return an image in mode L."""
        from PIL import Image

        return Image.fromarray(self.images[index])

    def fingerprint(self) -> bytes:
        """Return a hash of all bytes."""
        return hashlib.sha256(np.ascontiguousarray(self.images).data).digest()


@dataclass(frozen=True, kw_only=True)
class LabeledImages:
    """The images of a source and their class indices (N,)."""

    source: ImageSource
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FoundImages:
    """The images at a path by split, at least `train`, and the names of the classes, in order."""

    splits: Mapping[str, LabeledImages]
    classes: tuple[str, ...]


SplitNames = Mapping[str, Sequence[str]]
"""Names to search for, by split; empty for a split that is a share of the training images."""


def decode(data: bytes, name: str) -> Image:
    """Decode an image to grayscale or RGB, or raise `UserError` with its name if this fails."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data))
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable image; replace or remove it") from error


def check_classes(origin: str, found: Iterable[str], classes: Sequence[str]) -> None:
    """Check that a split has exactly the classes of the training images.

    Args:
        origin: folder or file of the split, for messages.
        found: classes of the split.
        classes: classes of the training images.

    Raises:
        UserError: a class is missing, or there is an additional one.
    """
    missing, more = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
    if missing or more:
        problems = [f"lacks class {missing[0]!r}"] if missing else []
        problems += [f"has class {more[0]!r}, which the training images lack"] if more else []
        raise UserError(f"{origin}: {' and '.join(problems)}; every split needs the same classes")


def split_of(relative: Path, names: SplitNames) -> str | None:
    """Return the split that a file belongs to according to its path, or None.

    The file's name is checked first, then the names of its parent folders, starting with the
    nearest. A name matches if it is the name of a split, in any case, or begins with it and
    continues with a character other than a letter.
    """
    for name in reversed(relative.parts):
        word = re.split(r"[^A-Za-z]", name, maxsplit=1)[0].lower()
        stem = name.lower().partition(".")[0]
        for split, known in names.items():
            if word in known or stem in [entry.lower() for entry in known]:
                return split
    return None
