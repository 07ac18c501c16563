"""Checkpoints of a training: hashed, written whole, two kept."""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from nipq_search import storage

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


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `<folder>/<step>/state.pt`, then the manifest that makes it count.

    Raises:
        OSError: the disk is full; earlier checkpoints are intact.
    """
    data = to_bytes(state)
    target = folder / f"{step:09d}"
    try:
        storage.write_bytes(target / "state.pt", data)
        manifest = {"step": step, "state": storage.digest(data), "bytes": len(data)}
        storage.write_sealed(target / "manifest.json", manifest)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    for old in _checkpoints(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint in `folder`, or None. A damaged one is reported and passed."""
    for candidate in _checkpoints(folder):
        manifest = storage.read_sealed(candidate / "manifest.json")
        try:
            data = (candidate / "state.pt").read_bytes()
        except OSError:
            data = b""
        if manifest is not None and storage.digest(data) == manifest["state"]:
            return from_bytes(data)
        _log.warning("checkpoint %s is damaged: using the one before it", candidate)
    return None


def remove_checkpoints(folder: Path) -> None:
    """Delete every checkpoint of a training that has ended."""
    shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), reverse=True)
