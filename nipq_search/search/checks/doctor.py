"""`doctor`: checks the installation and everything that a sweep file requires."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nipq_search.errors import UserError
from nipq_search.search.config.sweep_config import SweepConfig

PACKAGES = (
    "torch",
    "ray",
    "optuna",
    "mlflow",
    "pandas",
    "pyarrow",
    "plotly",
    "pydantic",
    "optuna-dashboard",
)


def doctor(
    config: SweepConfig | None = None, address: str | None = None, out: Path | None = None
) -> list[dict[str, Any]]:
    """Run every check and report failures in the result instead of raising them.

    Args:
        config: if given, also check the data, budgets and checkpoint storage of this sweep.
        address: if given, also check every node of the Ray cluster at this address.
        out: the folder that all nodes must share; defaults to the current folder.

    Returns:
        One mapping per check and per node, with the keys `check` (its name), `ok`, `detail` and
        `fix`; `fix` is None if the check passed.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        *((package, lambda p=package: importlib.metadata.version(p)) for package in PACKAGES),
        ("machine", _machine),
        ("kernels", _kernels),
        ("disk", _disk),
        ("study storage", _storage),
        ("tracking", _tracking),
        ("plug-ins", _plugins),
    ]
    if config is not None:
        checks += [
            ("task and data", lambda: _task(config)),
            ("budgets", lambda: _budgets(config)),
        ]
        if (home := config.checkpoints) is not None:
            checks.append(("checkpoints", lambda: _checkpoints(home)))
    found = [_run(name, check) for name, check in checks]
    if address is not None:
        found += _nodes(address, out or Path.cwd(), config)
    return found


def _nodes(address: str, out: Path, config: SweepConfig | None) -> list[dict[str, Any]]:
    from nipq_search.search.checks.doctor_nodes import check_nodes

    found: list[dict[str, Any]] = []

    def check() -> str:
        found.extend(check_nodes(address, out.absolute(), config))
        return f"{len(found)} nodes"

    return [_run("cluster", check), *found]


def _run(name: str, check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"check": name, "ok": True, "detail": check(), "fix": None}
    except importlib.metadata.PackageNotFoundError:
        fix = "python -m pip install 'nipq-search[all]'"
        return {"check": name, "ok": False, "detail": "not installed", "fix": fix}
    except UserError as error:
        return {"check": name, "ok": False, "detail": "rejected", "fix": str(error)}
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"check": name, "ok": False, "detail": detail, "fix": "see the message"}


def _machine() -> str:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"{os.cpu_count()} CPU cores, {gpus} GPUs, torch {torch.__version__}"


def _kernels() -> str:
    from nipq_search.quant.kernels.build import SWITCH, library, switched_off

    if switched_off():
        return f"torch operations, because {SWITCH} is set"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if library() is not None:
            return "the quantizers' C library is built"
    return "; ".join(str(warning.message) for warning in caught) or "torch operations"


def _disk() -> str:
    with tempfile.NamedTemporaryFile(dir=Path.cwd()) as file:
        file.write(b"x" * 1024)
        file.flush()
    free = shutil.disk_usage(Path.cwd()).free
    if free < 1 << 30:
        raise UserError(f"only {free >> 20} MB free here; free up space or choose another --out")
    return f"{free >> 30} GB free in {Path.cwd()}"


def _checkpoints(home: str) -> str:
    from nipq_search.search.checks.preflight import check_checkpoints

    check_checkpoints(home)
    return f"{home.partition('?')[0]} can be written and read back"


def _storage() -> str:
    from nipq_search.search.study.storage import close_storage, open_storage, storage_url

    if storage_url() is None:
        return "a file in the sweep's folder (set NIPQ_STORAGE_URL to use a server)"
    close_storage(open_storage(Path.cwd()))
    return "the server at NIPQ_STORAGE_URL responds"


def _tracking() -> str:
    from nipq_search.tracking.server import environment_uri, open_client

    uri = environment_uri()
    if uri is None:
        return "a file in the sweep's folder (set MLFLOW_TRACKING_URI to use a server)"
    try:
        open_client(uri).search_experiments(max_results=1)
    except Exception as error:
        raise UserError(
            f"MLFLOW_TRACKING_URI: the server does not respond ({type(error).__name__}); check "
            "the URI, user and password, and that the server is running"
        ) from error
    return "the server at MLFLOW_TRACKING_URI responds"


def _plugins() -> str:
    from nipq_search.search.config.plugins import FAMILIES, installed_plugins

    if clashes := [line for registry in FAMILIES.values() for line in registry.clashes()]:
        fix = "rename the entry points, or uninstall one of the packages"
        raise UserError(f"{'; '.join(clashes)}: {fix}")
    found = [f"{entry} ({plugin})" for entry, plugin in installed_plugins()]
    return ", ".join(found) or "none installed"


def _task(config: SweepConfig) -> str:
    from nipq_search.search.checks.preflight import load_task
    from nipq_search.tasks.base import dataset

    data = dataset(load_task(config))
    return f"{data['name']}: {data['splits'] or 'the task reports no split sizes'}"


def _budgets(config: SweepConfig) -> str:
    from nipq_search.search.checks.preflight import load_task
    from nipq_search.search.coordinator.resolved import resolve_sweep

    resolved = resolve_sweep(config, load_task(config))
    return f"{len(resolved.budgets)} budgets, all reachable"
