"""Arguments with which the conformance tests build a task: tiny data of its own, if it needs any.

A task that needs arguments has a function here; it writes its files into the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

ARGUMENTS: dict[str, Callable[[Path], dict[str, Any]]] = {}
"""By the name of the task in the registry; a task without an entry is built without arguments."""


def sample_arguments(name: str, folder: Path) -> dict[str, Any]:
    """`task_args` of a small instance of a task; calls with the same folder give the same."""
    return ARGUMENTS[name](folder) if name in ARGUMENTS else {}
