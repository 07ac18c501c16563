"""Checkpoints of a training: hashed, written whole, two kept."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nipq_search import blobs, storage

KEEP = 2
_log = logging.getLogger("nipq_search")


def to_bytes(state: dict[str, Any]) -> bytes:
    """A state of tensors and plain types as bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> dict[str, Any]:
    """The state in `data`; nothing but tensors and plain types is ever unpickled."""
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    home: str | None = None,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """Write `<folder>/<step>/state.pt`, then the manifest that makes it count.

    Args:
        folder: of the training's checkpoints.
        step: that the state is of.
        state: see `to_bytes`.
        home: URI of the training's home in an object store, where the state is to lie instead.
        fence: raises if the training is another process's by now. The write may have hung for
            long: it is asked again before others' checkpoints are removed.

    Raises:
        OSError: the disk is full; earlier checkpoints are intact.
        Exception: what `fence` raises; earlier and later checkpoints are intact.
    """
    data = to_bytes(state)
    target = folder / f"{step:09d}"
    try:
        inside = blobs.within(home, "checkpoints", target.name)
        blobs.write(target / "state.pt", data, inside)
        manifest = {"step": step, "state": storage.digest(data), "bytes": len(data)}
        storage.write_sealed(target / "manifest.json", manifest)
    except OSError:
        blobs.remove(target)
        raise
    fence()
    # What lies ahead is damaged, or the training would have gone on from there; without a manifest
    # it was cut off. Neither may take the place of a good one.
    whole = []
    for other in _checkpoints(folder):
        ahead = int(other.name) > step
        if ahead or storage.read_sealed(other / "manifest.json") is None:
            blobs.remove(other)
        else:
            whole.append(other)
    for old in whole[KEEP:]:
        blobs.remove(old)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint in `folder`, or None. A damaged one is reported and passed.

    Raises:
        blobs.StoreAway: the object store that holds it does not answer.
    """
    for candidate in _checkpoints(folder):
        manifest = storage.read_sealed(candidate / "manifest.json")
        try:
            data = blobs.read(candidate / "state.pt")
        except blobs.StoreAway:
            raise  # not damaged: to begin anew would lose work
        except OSError:
            data = b""
        if manifest is not None and storage.digest(data) == manifest["state"]:
            return from_bytes(data)
        _log.warning("checkpoint %s is damaged: using the one before it", candidate)
    return None


def remove_checkpoints(folder: Path) -> None:
    """Delete every checkpoint of a training that has ended."""
    blobs.remove(folder)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), reverse=True)
