"""The source code that Ray ships to a cluster's nodes: this package and the task's module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

EXCLUDES = ["__pycache__", "*.pyc", ".git", "runs", "checkpoints", "*.pt", "mlruns", "mlartifacts"]
"""Patterns of files that are never shipped: caches and the files that sweeps write."""


def sources(task: str) -> list[Path]:
    """Return the package folders and module files that a worker must be able to import.

    A module outside a package is shipped as a single file, so a task that consists of several
    files must be a package. To find a task's module, the current folder is added to `sys.path`.

    Args:
        task: the task's name in the sweep file. Registered tasks add nothing, because they belong
            to this package or to an installed plug-in.
    """
    found = [Path(__file__).parents[2]]
    name = task.partition(":")[0].partition(".")[0]
    if ":" not in task or name == "nipq_search":
        return found
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        found.append(Path(next(iter(spec.submodule_search_locations))))
    elif spec is not None and spec.origin and Path(spec.origin).is_file():
        found.append(Path(spec.origin))
    return found


def can_ship_code() -> bool:
    """Return whether this installation can ship code, which requires `ray[default]`."""
    # `aiohttp_cors` is a dependency that only the extra `default` installs.
    return importlib.util.find_spec("aiohttp_cors") is not None
