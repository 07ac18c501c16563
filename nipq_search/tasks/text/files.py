"""Text files, plain or compressed; encoding errors report the position of the invalid byte."""

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
from nipq_search.tasks.common.arguments import argument_error
from nipq_search.tasks.common.package_files import PREFIX, list_files, resolve_file, resolve_path

DECOMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
"""Decompression functions by file suffix."""


UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""Byte order marks at the start of UTF-16 files."""


def read_bytes(path: Path) -> bytes:
    """Return the contents of a file, decompressed according to its suffix.

    Raises:
        UserError: the file cannot be read or decompressed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path}: cannot be read: {reason}") from error
    decompress = DECOMPRESSORS.get(path.suffix)
    try:
        return decompress(data) if decompress is not None else data
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{path}: cannot be decompressed as {path.suffix}: {error}; download the file again"
        ) from error


def read_text(path: Path, encoding: str) -> str:
    """Return the text of a file without its byte order mark.

    Raises:
        UserError: the file cannot be read, is not a text file, or has a different encoding.
    """
    data = read_bytes(path)
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
        if "\0" in text:
            raise _binary_error(path, data)
        return text
    except LookupError as error:
        raise argument_error("encoding", f"'{encoding}' is not a known encoding") from error
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        if b"\0" in data or data.startswith(UTF16):
            raise _binary_error(path, data) from error
        raise UserError(
            f"{path}: byte {start} is not valid {encoding}; set the file's encoding, for example "
            "`task_args: {encoding: latin-1}`"
        ) from error


def _binary_error(path: Path, data: bytes) -> UserError:
    """Return the error for a file that is encoded as UTF-16 or contains NUL bytes."""
    if data.startswith(UTF16):
        return UserError(f"{path}: encoded as UTF-16; set `task_args: {{encoding: utf-16}}`")
    return UserError(f"{path}: not a text file, because it contains NUL bytes")


def find_files(given: Iterable[str], key: str) -> list[Path]:
    """Return the files at the given paths; each file is returned once.

    A path is a file, a folder (all files below it) or a pattern with `*`. The files of a folder or
    pattern are sorted by name; hidden files are ignored.

    Args:
        given: paths, folders and patterns, or paths inside packages; see `resolve_path`.
        key: key in the sweep file, for messages.

    Returns:
        Absolute paths, in the order of `given`.

    Raises:
        UserError: a path is invalid or matches no file.
        PermissionError: a folder cannot be read.
    """
    found: list[Path] = []
    for path in given:
        matches = _matches(path, key)
        if not matches:
            raise UserError(f"{key}: no files found at {path}")
        found += matches
    return list(dict.fromkeys(found))


def _matches(path: str, key: str) -> list[Path]:
    """Return the files at one path, which may be a file, a folder or a pattern."""
    resolved = resolve_path(path, key)
    is_pattern = (
        not path.startswith(PREFIX)
        and glob.has_magic(str(resolved))
        and not os.path.exists(resolved)
    )
    if is_pattern:
        names = sorted(glob.glob(str(resolved), recursive=True))
        return [Path(name) for name in names if Path(name).is_file()]
    if resolved.is_dir():
        return list_files(resolved)
    return [resolve_file(path, key)]
