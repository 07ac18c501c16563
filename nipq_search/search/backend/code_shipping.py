"""The code that must reach the nodes of a cluster: this package and the task's own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

EXCLUDES = ["__pycache__", "*.pyc", ".git", "runs", "checkpoints", "*.pt", "mlruns", "mlartifacts"]
"""What never travels: caches, and what sweeps leave behind."""


def sources(task: str) -> list[Path]:
    """Folders of packages, and files of single modules, that a worker has to import.

    Args:
        task: as the sweep file names it; a registered one is part of this package.

    A module that is not in a package travels alone: put a task of several files into a package.
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


def can_travel() -> bool:
    """Whether this installation can send code: Ray needs the parts of `ray[default]` for it."""
    return importlib.util.find_spec("aiohttp_cors") is not None
