"""MLflow's tables for the tests of the recorder."""

from __future__ import annotations

import pytest
from mlflow_template import use_template


@pytest.fixture(autouse=True, scope="session")
def _mlflow_template() -> None:
    """Let the recorders of this process copy an empty MLflow database."""
    use_template()
