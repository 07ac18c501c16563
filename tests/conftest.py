"""Settings of the whole test run."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """One torch thread: small tensors gain nothing from more, and results do not depend on it."""
    torch.set_num_threads(1)
