"""Atomic writes, digests and sealed JSON files.

Also detects network file systems, and reads settings from environment variables or from files
that they name.
"""

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
"""Error numbers that file systems without hard links report."""


@contextmanager
def _flushed(path: Path, data: bytes) -> Iterator[str]:
    """Write `data` to a temporary file next to `path`, for the caller to rename or link to `path`.

    The file is flushed to disk before it is renamed or linked, and the folder afterwards, so that
    a crash cannot leave an incomplete file at `path`.

    Yields:
        The path of the temporary file.
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
            error.filename = str(path)  # errors such as "disk full" do not name a file
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: readers see the old or the new file, even after a crash.

    Raises:
        OSError: the disk is full or the folder is not writable; the old file is intact.
    """
    with _flushed(path, data) as temporary:
        os.replace(temporary, path)


def write_once(path: Path, data: bytes) -> bool:
    """Write `data` to `path` unless the file exists; the first of several writers wins.

    On file systems without hard links, the check and the write are not one atomic operation.

    Returns:
        Whether `path` now contains `data`; without hard links, False if the file existed at all.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    with _flushed(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            # NFS also reports this error if the link was created but the server's reply was lost.
            return path.read_bytes() == data
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                return False
            os.replace(temporary, path)
    return True


def write_json(path: Path, document: Any) -> None:
    """Write `document` as JSON, atomically; raise `ValueError` for NaN or an infinite number."""
    write_bytes(path, as_json(document))


def as_json(document: Any) -> bytes:
    """Serialize `document` as indented JSON; raise `ValueError` for NaN or an infinite number."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any | None:
    """Return the JSON document in `path`; None if the file cannot be read or is not valid JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def digest(data: bytes) -> str:
    """Return the SHA-256 digest of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def canonical(document: Any) -> bytes:
    """Serialize `document` as JSON with sorted keys, so that equal documents give equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_sealed(path: Path, document: dict[str, Any]) -> None:
    """Write `document` together with its digest, which `read_sealed` verifies."""
    write_bytes(path, as_json(_sealed(document)))


def seal_once(path: Path, document: dict[str, Any]) -> bool:
    """Write a sealed document unless the file exists; see `write_once`."""
    return write_once(path, as_json(_sealed(document)))


def _sealed(document: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `document` that also contains its digest."""
    return {**document, "sha256": digest(canonical(document))}


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return a sealed document without its digest, or None if the file is missing or damaged."""
    document = read_json(path)
    if not isinstance(document, dict):
        return None
    seal = document.pop("sha256", None)
    return document if seal == digest(canonical(document)) else None


_NETWORK = {"9p", "afs", "ceph", "cifs", "fuse.sshfs", "glusterfs", "lustre", "smb3", "smbfs"}
_NETWORK |= {"beegfs", "fuse.beegfs", "fuse.ceph", "fuse.glusterfs", "fuse.juicefs", "gpfs"}
_NETWORK |= {"nfs", "nfs4", "ocfs2", "orangefs", "panfs", "wekafs"}
"""Types of network file systems, as the kernel names them."""

_MOUNTS = Path("/proc/self/mounts")


def network_file_system_type(path: Path) -> str | None:
    """Return the type of the network file system that contains `path`, or None if it is local.

    This matters because SQLite's locks are unreliable on network file systems. `path` need not
    exist. The result is also None on systems without `/proc`.
    """
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return None
    path, kind, deepest = path.resolve(), None, -1
    for line in lines:
        fields = line.split(" ")
        # Mount points encode spaces as octal escapes.
        point = Path(fields[1].encode().decode("unicode_escape"))
        if path.is_relative_to(point) and len(point.parts) >= deepest:
            deepest, kind = len(point.parts), fields[2]
    return kind if kind in _NETWORK else None


def setting(name: str) -> str | None:
    """Return the value of the environment variable `name`, which may also be stored in a file.

    If the variable is not set, the result is the content of the file that `<name>_FILE` names, or
    None if that variable is not set either.

    Raises:
        UserError: the file is unreadable or empty.
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
        raise UserError(f"{name}_FILE: {file}: not a text file") from error
    raise UserError(f"{name}_FILE: {file} is empty; write the URL into it")
