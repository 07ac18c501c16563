"""Text from files, plain or compressed; a wrong encoding is named with its place."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from nipq_search.errors import UserError
from nipq_search.tasks.common.package_files import PREFIX, files_below, resolve, resolve_file

OPENERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
"""How a compressed file is read, by the end of its name."""


UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""What files in UTF-16 begin with."""


def read_bytes(path: Path) -> bytes:
    """Contents of a file, decompressed as its name says; `UserError` if that fails."""
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path}: cannot be read: {reason}") from error
    opener = OPENERS.get(path.suffix)
    try:
        return opener(data) if opener is not None else data
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{path}: cannot be decompressed as {path.suffix}: {error}; fetch the file again"
        ) from error


def read_text(path: Path, encoding: str) -> str:
    """Text of a file without a byte order mark.

    Raises:
        UserError: it cannot be read, is no text, or has bytes that the encoding does not know.
    """
    data = read_bytes(path)
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
        if "\0" in text:
            raise _no_text(path, data)
        return text
    except LookupError as error:
        raise UserError(f"task_args.encoding: no encoding is called '{encoding}'") from error
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        if b"\0" in data or data.startswith(UTF16):
            raise _no_text(path, data) from error
        raise UserError(
            f"{path}: byte {start} is not {encoding}; name the file's encoding with "
            "`task_args: {encoding: latin-1}`, or another"
        ) from error


def _no_text(path: Path, data: bytes) -> UserError:
    """What is to be said of a file with zero bytes."""
    if data.startswith(UTF16):
        return UserError(f"{path}: this is UTF-16; write `task_args: {{encoding: utf-16}}`")
    return UserError(f"{path}: this is no text file: it has zero bytes in it")


def find_files(given: Iterable[str], key: str) -> list[Path]:
    """Files that paths name: a file, a folder (all files below it) or a pattern with `*`.

    Files of a folder or pattern come in the order of their names; hidden ones are left out.

    Raises:
        UserError: a path leads to no file.
    """
    found: list[Path] = []
    for path in given:
        pattern = str(resolve(path, key)) if not path.startswith(PREFIX) else ""
        if pattern and glob.has_magic(pattern) and not os.path.exists(pattern):
            names = (Path(name) for name in sorted(glob.glob(pattern, recursive=True)))
            matches = [name for name in names if name.is_file()]
        elif (folder := resolve(path, key)).is_dir():
            matches = files_below(folder)
        else:
            matches = [resolve_file(path, key)]
        if not matches:
            raise UserError(f"{key}: no file in {path}")
        found += [match for match in matches if match not in found]
    return found
