"""Processes that the warm server forks."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_helpers import Command

pytestmark = pytest.mark.cluster


def test_forked_processes_draw_different_ids(tmp_path: Path) -> None:
    """Workers of one cluster with equal IDs overwrite each other's objects."""
    script = tmp_path / "draw.py"
    script.write_text("import ray, ray.tune\nprint(ray.ObjectRef.from_random().hex())\n")
    command = Command(tmp_path)
    assert len({command(script=script).stdout for _ in range(3)}) == 3
