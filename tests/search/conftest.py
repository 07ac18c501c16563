"""Settings of the tests of the search."""

from __future__ import annotations

import os

import pytest
from sweep_helpers import warm_start


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the ranks of training runs from a process that has imported torch."""
    for name, value in warm_start().items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(os.environ["PYTHONPATH"].partition(os.pathsep)[0])
