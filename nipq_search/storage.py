"""Files that are either whole or absent: atomic writes and digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nipq_search.errors import UserError

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""How file systems without hard links refuse to make one."""


@contextmanager
def _flushed(path: Path, data: bytes) -> Iterator[str]:
    """A file beside `path` that holds `data`, to be given its name; the folder is flushed then.

    The data reach the disk before the name does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        yield temporary
    except OSError as error:
        if error.filename in (None, temporary):
            error.filename = str(path)  # a full disk does not say where
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is intact.
    """
    with _flushed(path, data) as temporary:
        os.replace(temporary, path)


def write_once(path: Path, data: bytes) -> bool:
    """Write `data` to `path` unless there is such a file: of several writers the first one wins.

    Where the file system has no hard links, looking and writing are two steps.

    Returns:
        Whether `path` holds `data` now.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    with _flushed(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            # Over NFS a link that was made may be answered so, when the first answer got lost.
            return path.read_bytes() == data
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                return False
            os.replace(temporary, path)
    return True


def write_json(path: Path, document: Any) -> None:
    """Write `document` as JSON, atomically. NaN is refused (`ValueError`)."""
    write_bytes(path, as_json(document))


def as_json(document: Any) -> bytes:
    """`document` as a JSON file's bytes. NaN is refused (`ValueError`)."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any | None:
    """Return the JSON document in `path`, or None where the file is missing or torn."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def digest(data: bytes) -> str:
    """SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def canonical(document: Any) -> bytes:
    """`document` as JSON bytes that do not depend on key order or spacing."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_sealed(path: Path, document: dict[str, Any]) -> None:
    """Write `document` with a digest of itself, to be read by `read_sealed`."""
    write_bytes(path, as_json(_sealed(document)))


def seal_once(path: Path, document: dict[str, Any]) -> bool:
    """Like `write_sealed`, but the first writer wins; see `write_once`."""
    return write_once(path, as_json(_sealed(document)))


def _sealed(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "sha256": digest(canonical(document))}


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return a document written by `write_sealed`; None if missing, torn or altered."""
    document = read_json(path)
    if not isinstance(document, dict):
        return None
    seal = document.pop("sha256", None)
    return document if seal == digest(canonical(document)) else None


_NETWORK = {"9p", "afs", "ceph", "cifs", "fuse.sshfs", "glusterfs", "lustre", "smb3", "smbfs"}
_NETWORK |= {"beegfs", "fuse.beegfs", "fuse.ceph", "fuse.glusterfs", "fuse.juicefs", "gpfs"}
_NETWORK |= {"nfs", "nfs4", "ocfs2", "orangefs", "panfs", "wekafs"}
_MOUNTS = Path("/proc/self/mounts")


def network_file_system(path: Path) -> str | None:
    """The kind of network file system that `path` is, or will be, on; None for a local one.

    SQLite's locks do not work over a network. Where there is no `/proc`, nothing is known: None.
    """
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return None
    path, kind, deepest = path.resolve(), None, -1
    for line in lines:
        fields = line.split(" ")
        # Spaces in a mount point are written as octal escapes.
        point = Path(fields[1].encode().decode("unicode_escape"))
        if path.is_relative_to(point) and len(point.parts) >= deepest:
            deepest, kind = len(point.parts), fields[2]
    return kind if kind in _NETWORK else None


def setting(name: str) -> str | None:
    """An environment variable, or what is in the file that the variable `<name>_FILE` names.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    if value := os.environ.get(name):
        return value
    if not (file := os.environ.get(f"{name}_FILE")):
        return None
    try:
        if value := Path(file).read_text().strip():
            return value
    except OSError as error:
        raise UserError(f"{name}_FILE: {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}_FILE: {file}: not a text") from error
    raise UserError(f"{name}_FILE: {file} is empty; write the URL into it")
