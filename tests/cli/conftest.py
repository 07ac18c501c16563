"""A fake search layer for testing the commands without training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from cli_documents import FREED, FRONT, LAYER, POINT

from nipq_search.errors import UserError


@dataclass
class FakeSearch:
    """The values that the fake returns; tests modify them."""

    folder: Path
    outcome: dict[str, Any] = field(
        default_factory=lambda: {
            "state": "finished",
            "message": "",
            "complete": 2,
            "failed": 0,
            "pruned": 0,
        }
    )
    error: BaseException | None = None
    best: dict[str, Any] = field(
        default_factory=lambda: {"point": POINT, "nearest": None, "blocks": []}
    )
    checks: list[dict[str, Any]] = field(
        default_factory=lambda: [{"check": "torch", "ok": True, "detail": "2.14", "fix": None}]
    )
    driver: str | None = None
    replayed: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def open(self, folder: Path) -> FakeSweep:
        print("a library prints this on stdout")
        if self.error is not None:
            raise self.error
        if folder != self.folder:
            raise UserError(f"{folder} is not a sweep")
        return FakeSweep(self)

    def load_config(self, path: Path, overrides: Any = ()) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        self.calls.append(("load_config", path, list(overrides)))
        return SimpleNamespace(name="tiny", search=SimpleNamespace(trials=2))

    def run_sweep(self, config: Any, out: Path, **options: Any) -> SimpleNamespace:
        progress = options.pop("progress")
        self.calls.append(("run_sweep", out, options))
        progress.message("trial 0 COMPLETE")
        print("ray prints this on stdout")
        self.folder = out
        return SimpleNamespace(**self.outcome)

    def replay(self, sweep: Any, trial: int, report: Any) -> dict[str, Any]:
        report("epoch 1")
        sha = {"model_sha256": "0" * 64}
        return {
            "schema": 1,
            "trial": trial,
            "equal": True,
            "exact": True,
            "differences": [],
            **sha,
        } | (self.replayed)

    def collect(self, folder: Path, dry_run: bool) -> dict[str, Any]:
        self.open(folder)
        kept = [{"trial": 0, "why": "on the front"}]
        freed = {"bytes": FREED["bytes"], "freed": [FREED]}
        return {"schema": 1, "dry_run": dry_run, **freed, "kept": kept}

    def plan(self, config: Any) -> dict[str, Any]:
        return {
            "schema": 1,
            "layers": [{**LAYER, "searched": True}],
            "reachable": {"bops": {"least": 1e9, "greatest": 2e10}},
            "budgets": [
                {
                    "label": "bops: uniform 4",
                    "targets": {"bops": 5.3e9},
                    "reachable": {"bops": 5.2e9},
                    "reachable_share": 0.98,
                }
            ],
            "trials": 20,
            "samples": 1_000_000,
            "noise_steps": 120,
            "disk_bytes": 5_000_000,
            "bops_convention": 1,
        }


@dataclass
class FakeSweep:
    search: FakeSearch

    @property
    def folder(self) -> Path:
        return self.search.folder

    def status(self) -> dict[str, Any]:
        states = {"COMPLETE": 2, "PRUNED": 0, "FAIL": 1, "RUNNING": 1, "WAITING": 0}
        trial = {"trial": 0, "state": "FAIL", "reason": "loss is\nNaN", "epoch": None}
        return {
            "schema": 1,
            "sweep": "tiny",
            "states": states,
            "driver": {"host": "here", "pid": 7},
            "total": 4,
            "total_samples": float("nan"),
            "trials": [trial],
        }

    def front_document(self) -> dict[str, Any]:
        return FRONT

    def show(self, trial: int) -> dict[str, Any]:
        params = {"lr": 0.012345, "proxy": "uniform"}
        return {"schema": 1, **POINT, "state": "COMPLETE", "params": params, "layers": [LAYER]}

    def best(self, limits: dict[str, float]) -> dict[str, Any]:
        self.search.calls.append(("best", limits))
        return {"schema": 1, "limits": limits, **self.search.best}

    def log_files(self, trial: int) -> list[Path]:
        return sorted(self.search.folder.glob(f"trials/{trial}/*/output.log"))

    def write_report(self) -> Path:
        return self.search.folder / "report.html"


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeSearch:
    """Replace the modules of the search layer with the fake."""
    fake = FakeSearch(folder=tmp_path)
    parts: dict[str, dict[str, Callable[..., Any] | SimpleNamespace]] = {
        "config.sweep_config": {"load_config": fake.load_config},
        "run": {"run_sweep": fake.run_sweep},
        "results.sweep": {"Sweep": SimpleNamespace(open=fake.open)},
        "commands.plan": {"plan": fake.plan},
        "checks.doctor": {"doctor": lambda config, address=None, out=None: fake.checks},
        "commands.replay": {"replay": fake.replay},
        "results.retention": {"collect": fake.collect},
        "results.outputs": {"sync": lambda folder: {"server": "http://server", "trials": 2}},
        "jobs.lease": {"request_stop": lambda folder: fake.driver},
    }
    for name, members in parts.items():
        module = ModuleType(f"nipq_search.search.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake
