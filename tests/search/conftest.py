"""A finished sweep of tiny training runs, created once and copied by tests that change it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from mlflow_template import use_template
from sweep_helpers import warm_start
from unit_helpers import make_config, run_here


@pytest.fixture(autouse=True, scope="session")
def _mlflow_template() -> None:
    """Sweeps of this process copy MLflow's empty database."""
    use_template()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a read-only sweep of four trials under `fill`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("NIPQ_STORAGE", "MLFLOW_"))]:
            patch.delenv(name)
        out = tmp_path_factory.mktemp("finished") / "sweep"
        run_here(make_config(search__strategy="fill", search__trials=5), out)
    return out


@pytest.fixture
def sweep_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` to change."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the ranks of training runs from a process that has imported torch."""
    for name, value in warm_start().items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(os.environ["PYTHONPATH"].partition(os.pathsep)[0])
