"""Large files, models and checkpoints: in a sweep's folder, or in an object store.

In an object store (or any file system that pyarrow knows by a URI: `s3://`, `gs://`, `file://`) an
object is never written over: each has a name of its own. Beside where the file would be lies a
pointer, sealed and written last, with the object's URI and digest. So a reader sees the old file
or the new one, and a damaged object is noticed.
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

from nipq_search import storage
from nipq_search.errors import UserError

_POINTER = ".at"
_SECRETS = ("secret", "key", "sig", "token", "password")
"""Parts of the names of query parameters that hold secrets."""


class StoreAway(OSError):
    """An object store does not answer, or refuses."""


def check_home(uri: str) -> None:
    """Check the form of a URI.

    Raises:
        UserError: it is no URI, or holds a secret.
    """
    parts = urlsplit(uri)
    if not parts.scheme or "://" not in uri or not (parts.netloc or parts.path.strip("/")):
        raise UserError(f"{uri!r} is no URI; write s3://BUCKET/FOLDER, gs://... or file:///...")
    names = {name.lower() for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
    keys = parts.password or (parts.username and parts.scheme in ("s3", "gs", "gcs"))
    if keys or any(word in name for name in names for word in _SECRETS):
        raise UserError(
            "leave keys out of the URI, which is written to files; S3 takes AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or the machine's own role"
        )


def within(home: str | None, *names: str) -> str | None:
    """The URI of something inside a home; None for none."""
    if home is None:
        return None
    base, mark, query = home.partition("?")
    return "/".join([base.rstrip("/"), *map(quote, names)]) + mark + query


@contextmanager
def _store(uri: str) -> Iterator[tuple[Any, str]]:
    """File system and path of a URI.

    Raises:
        FileNotFoundError: there is no such object.
        StoreAway: anything else.
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
        raise StoreAway(errno.EIO, f"{uri.partition('?')[0]}: {reason}") from error


def write(path: Path, data: bytes, home: str | None) -> None:
    """Write `data` as the file `path`, or as an object inside `home`, if that is given.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    old = storage.read_sealed(_pointer(path))
    if home is None:
        storage.write_bytes(path, data)
        _pointer(path).unlink(missing_ok=True)
    else:
        digest = storage.digest(data)
        uri = _put(home, f"{path.name}-{digest[:12]}-{uuid.uuid4().hex[:12]}", data)
        storage.write_sealed(_pointer(path), {"uri": uri, "digest": digest, "bytes": len(data)})
        path.unlink(missing_ok=True)
    if old is not None:
        _forget(old["uri"])


def _put(home: str, name: str, data: bytes) -> str:
    """Write a new object; its URI."""
    uri = within(home, name)
    assert uri is not None
    with _store(uri) as (files, place):
        if files.type_name == "local":
            files.create_dir(place.rpartition("/")[0], recursive=True)
        with files.open_output_stream(place) as stream:
            stream.write(data)
    return uri


def read(path: Path) -> bytes:
    """What `write` wrote.

    Raises:
        StoreAway: the object store does not answer.
        OSError: it is not there, cannot be read, or is damaged.
    """
    pointer = storage.read_sealed(_pointer(path))
    if pointer is None:
        return path.read_bytes()
    with _store(pointer["uri"]) as (files, place), files.open_input_stream(place) as stream:
        data: bytes = stream.read()
    if storage.digest(data) != pointer["digest"]:
        raise OSError(errno.EBADMSG, f"{pointer['uri'].partition('?')[0]}: damaged")
    return data


def exists(path: Path) -> bool:
    """Whether the file, or a pointer in its place, is there."""
    return path.is_file() or storage.read_sealed(_pointer(path)) is not None


def can_be_read(path: Path) -> bool:
    """Whether the file is there, or the object is where the pointer says.

    Raises:
        StoreAway: the object store does not answer.
    """
    pointer = storage.read_sealed(_pointer(path))
    if pointer is None:
        return path.is_file()
    with _store(pointer["uri"]) as (files, place):
        return bool(files.get_file_info(place).is_file)


def digest_of(path: Path) -> str | None:
    """Digest of the content; None where there is none. An object is not read for it."""
    pointer = storage.read_sealed(_pointer(path))
    if pointer is not None:
        return str(pointer["digest"])
    return storage.digest(path.read_bytes()) if path.is_file() else None


def size_of(path: Path) -> int:
    """Bytes of a file or of everything in a folder, objects elsewhere included."""
    if not path.is_dir():
        pointer = storage.read_sealed(_pointer(path))
        return int(pointer["bytes"]) if pointer is not None else path.stat().st_size
    files = [file for file in path.rglob("*") if file.is_file()]
    pointers = [storage.read_sealed(file) or {} for file in files if file.suffix == _POINTER]
    elsewhere = sum(int(pointer.get("bytes", 0)) for pointer in pointers)
    return elsewhere + sum(file.stat().st_size for file in files)


def remove(path: Path) -> bool:
    """Delete a file, or a folder and everything in it, with the objects that they stand for.

    Returns:
        False where something of a folder, or an object, could not be deleted; its pointer stays.
    """
    done = True
    pointers = sorted(path.rglob(f"*{_POINTER}")) if path.is_dir() else [_pointer(path)]
    for pointer in pointers:
        known = storage.read_sealed(pointer)
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


def probe(home: str) -> None:
    """Write an object and read it back.

    Raises:
        OSError: that fails.
    """
    word = uuid.uuid4().hex
    with _store(_put(home, f".probe-{word}", word.encode())) as (files, place):
        with files.open_input_stream(place) as stream:
            same = stream.read() == word.encode()
        files.delete_file(place)
    if not same:
        raise OSError(errno.EIO, f"{home.partition('?')[0]}: reads back something else")


def _pointer(path: Path) -> Path:
    return path.with_name(path.name + _POINTER)


def _forget(uri: str) -> bool:
    """Delete an object; whether it is gone. One that stays costs space and nothing else."""
    try:
        with _store(uri) as (files, place):
            files.delete_file(place)
    except FileNotFoundError:
        return True
    except (OSError, UserError):
        return False
    return True
