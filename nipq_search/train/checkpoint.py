"""Checkpoints of a training run: hashed and written atomically; the two newest are kept."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nipq_search import blobs, file_io

KEEP = 2
"""Number of checkpoints to keep."""

_log = logging.getLogger("nipq_search")


def to_bytes(state: dict[str, Any]) -> bytes:
    """Serialize a state, a dict of tensors and plain types, to bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> dict[str, Any]:
    """Deserialize a state to the CPU; only tensors and plain types are unpickled."""
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    home: str | None = None,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """Write a checkpoint, then remove invalid checkpoints and all but the `KEEP` newest ones.

    The checkpoint is a subfolder named after the step. It becomes valid when its manifest is
    written, which happens after the state is written.

    Args:
        folder: folder of the run's checkpoints.
        step: optimizer step of the state.
        state: state to save; see `to_bytes`.
        home: URI of the run's folder in an object store, which then stores the state; None
            stores it in `folder`.
        fence: raises if another process has taken over the training run. It is called after the
            write, which may have hung for a long time, and before old checkpoints are removed.

    Raises:
        OSError: writing failed, for example on a full disk; earlier checkpoints are intact.
        Exception: any exception that `fence` raises; no checkpoint has been removed.
    """
    data = to_bytes(state)
    target = folder / f"{step:09d}"
    try:
        inside = blobs.object_uri(home, "checkpoints", target.name)
        blobs.write(target / "state.pt", data, inside)
        manifest = {"step": step, "state": file_io.digest(data), "bytes": len(data)}
        file_io.write_sealed(target / "manifest.json", manifest)
    except OSError:
        blobs.remove(target)
        raise
    fence()
    # Checkpoints of later steps must be damaged, since training would otherwise have resumed from
    # them; those without a manifest are incomplete. Neither may displace a valid checkpoint.
    valid = []
    for other in _checkpoints(folder):
        ahead = int(other.name) > step
        if ahead or file_io.read_sealed(other / "manifest.json") is None:
            blobs.remove(other)
        else:
            valid.append(other)
    for old in valid[KEEP:]:
        blobs.remove(old)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the state in the newest valid checkpoint in `folder`, or None if there is none.

    Damaged and incomplete checkpoints are logged and skipped.

    Raises:
        blobs.StoreUnavailable: the object store cannot be reached or denies access.
        UserError: the state is in an object store, but pyarrow is not installed.
    """
    for candidate in _checkpoints(folder):
        manifest = file_io.read_sealed(candidate / "manifest.json")
        try:
            data = blobs.read(candidate / "state.pt")
        except blobs.StoreUnavailable:
            raise  # the checkpoint is not damaged, and starting over would lose work
        except OSError:
            data = b""
        if manifest is not None and file_io.digest(data) == manifest["state"]:
            return from_bytes(data)
        _log.warning("checkpoint %s is damaged or incomplete; skipping it", candidate)
    return None


def remove_checkpoints(folder: Path) -> None:
    """Delete the folder that contains the checkpoints of a finished training run."""
    blobs.remove(folder)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the folders of all checkpoints, valid or not, from the newest to the oldest."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), reverse=True)
