"""Large files (models and checkpoints) in a sweep's folder or in an object store.

An object store is any file system that pyarrow opens by URI: `s3://`, `gs://` or `file://`. Each
object has a unique name and is never overwritten. Once an object has been written, a sealed
pointer file with its URI and digest replaces the local file. Readers therefore see either the old
or the new content, and can detect a damaged object.
"""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from nipq_search import file_io
from nipq_search.errors import UserError

_POINTER = ".at"
"""Suffix of pointer files."""

_SECRETS = ("secret", "key", "sig", "token", "password")
"""Substrings of the names of query parameters whose values are secrets."""


class StoreUnavailable(OSError):
    """An operation on an object store failed for a reason other than a missing object.

    For example, the store cannot be reached or denies access.
    """


def check_home(uri: str) -> None:
    """Check that an object store's URI is well-formed and contains no secret.

    Raises:
        UserError: `uri` is not a URI or contains a secret.
    """
    parts = urlsplit(uri)
    if not parts.scheme or "://" not in uri or not (parts.netloc or parts.path.strip("/")):
        raise UserError(f"{uri!r} is not a URI; write s3://BUCKET/FOLDER, gs://... or file:///...")
    names = {name.lower() for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
    keys = parts.password or (parts.username and parts.scheme in ("s3", "gs", "gcs"))
    if keys or any(word in name for name in names for word in _SECRETS):
        raise UserError(
            "leave keys out of the URI, because it is written to files; for S3, set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use the machine's role"
        )


def object_uri(home: str | None, *names: str) -> str | None:
    """Return the URI of the object at the path `names` inside `home`; None if `home` is None."""
    if home is None:
        return None
    base, mark, query = home.partition("?")
    return "/".join([base.rstrip("/"), *map(quote, names)]) + mark + query


@contextmanager
def _store(uri: str) -> Iterator[tuple[Any, str]]:
    """Open the file system of a URI; I/O errors in the context become `StoreUnavailable`.

    Yields:
        The pyarrow file system and the path of the object in it.

    Raises:
        FileNotFoundError: the object does not exist.
        StoreUnavailable: an operation on the store failed for any other reason.
        UserError: pyarrow is not installed.
    """
    try:
        from pyarrow.fs import FileSystem
    except ImportError as error:
        raise UserError("`checkpoints` needs pyarrow: python -m pip install pyarrow") from error
    try:
        yield FileSystem.from_uri(uri)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StoreUnavailable(errno.EIO, f"{uri.partition('?')[0]}: {reason}") from error


def write(path: Path, data: bytes, home: str | None) -> None:
    """Write `data` to the file `path`, or to an object with a pointer file in place of `path`.

    Args:
        path: local path of the file.
        data: content of the file or object.
        home: URI of the folder for the object in an object store; None writes a local file.

    Raises:
        OSError: writing failed; the previous content is intact.
        UserError: `home` is given, but pyarrow is not installed.
    """
    old = file_io.read_sealed(_pointer(path))
    if home is None:
        file_io.write_bytes(path, data)
        _pointer(path).unlink(missing_ok=True)
    else:
        digest = file_io.digest(data)
        uri = _put(home, f"{path.name}-{digest[:12]}-{uuid.uuid4().hex[:12]}", data)
        file_io.write_sealed(_pointer(path), {"uri": uri, "digest": digest, "bytes": len(data)})
        path.unlink(missing_ok=True)
    if old is not None:
        _forget(old["uri"])


def _put(home: str, name: str, data: bytes) -> str:
    """Write a new object and return its URI."""
    uri = object_uri(home, name)
    assert uri is not None
    with _store(uri) as (files, place):
        if files.type_name == "local":
            files.create_dir(place.rpartition("/")[0], recursive=True)
        with files.open_output_stream(place) as stream:
            stream.write(data)
    return uri


def read(path: Path) -> bytes:
    """Return the content that `write` stored at `path`.

    Raises:
        StoreUnavailable: the object store cannot be reached or denies access.
        OSError: the file or object is missing, unreadable or damaged.
        UserError: the content is in an object store, but pyarrow is not installed.
    """
    pointer = file_io.read_sealed(_pointer(path))
    if pointer is None:
        return path.read_bytes()
    with _store(pointer["uri"]) as (files, place), files.open_input_stream(place) as stream:
        data: bytes = stream.read()
    if file_io.digest(data) != pointer["digest"]:
        raise OSError(errno.EBADMSG, f"{pointer['uri'].partition('?')[0]}: damaged")
    return data


def exists(path: Path) -> bool:
    """Return whether the file `path`, or a pointer file in its place, exists."""
    return path.is_file() or file_io.read_sealed(_pointer(path)) is not None


def can_be_read(path: Path) -> bool:
    """Return whether the content of `path` exists, in the local file or in an object store.

    Unlike `exists`, this also checks that the object to which a pointer file refers exists.

    Raises:
        StoreUnavailable: the object store cannot be reached or denies access.
    """
    pointer = file_io.read_sealed(_pointer(path))
    if pointer is None:
        return path.is_file()
    with _store(pointer["uri"]) as (files, place):
        return bool(files.get_file_info(place).is_file)


def digest_of(path: Path) -> str | None:
    """Return the SHA-256 digest of the content of `path`, or None if there is no content.

    The digest of an object is read from its pointer file, without downloading the object.
    """
    pointer = file_io.read_sealed(_pointer(path))
    if pointer is not None:
        return str(pointer["digest"])
    return file_io.digest(path.read_bytes()) if path.is_file() else None


def size_of(path: Path) -> int:
    """Return the size of a file or folder in bytes, including objects in an object store."""
    if not path.is_dir():
        pointer = file_io.read_sealed(_pointer(path))
        return int(pointer["bytes"]) if pointer is not None else path.stat().st_size
    files = [file for file in path.rglob("*") if file.is_file()]
    pointers = [file_io.read_sealed(file) or {} for file in files if file.suffix == _POINTER]
    elsewhere = sum(int(pointer.get("bytes", 0)) for pointer in pointers)
    return elsewhere + sum(file.stat().st_size for file in files)


def remove(path: Path) -> bool:
    """Delete a file or folder, and the objects to which its pointer files refer.

    Returns:
        Whether everything was deleted. The pointer file of an object that could not be deleted is
        kept.
    """
    done = True
    pointers = sorted(path.rglob(f"*{_POINTER}")) if path.is_dir() else [_pointer(path)]
    for pointer in pointers:
        known = file_io.read_sealed(pointer)
        if known is None or _forget(known["uri"]):
            pointer.unlink(missing_ok=True)
        else:
            done = False
    if not path.is_dir():
        path.unlink(missing_ok=True)
    elif done:
        shutil.rmtree(path, ignore_errors=True)
        done = not path.exists()
    return done


def check_store(home: str) -> None:
    """Check an object store by writing an object, reading it back and deleting it.

    Raises:
        OSError: an operation failed, or the content read back differs from the content written.
        UserError: pyarrow is not installed.
    """
    word = uuid.uuid4().hex
    with _store(_put(home, f".probe-{word}", word.encode())) as (files, place):
        with files.open_input_stream(place) as stream:
            same = stream.read() == word.encode()
        files.delete_file(place)
    if not same:
        raise OSError(errno.EIO, f"{home.partition('?')[0]}: the content read back is different")


def _pointer(path: Path) -> Path:
    """Return the path of the pointer file that replaces `path`."""
    return path.with_name(path.name + _POINTER)


def _forget(uri: str) -> bool:
    """Delete an object and return whether it no longer exists.

    A failure is not raised, because an object that is left behind only wastes space.
    """
    try:
        with _store(uri) as (files, place):
            files.delete_file(place)
    except FileNotFoundError:
        return True
    except (OSError, UserError):
        return False
    return True
