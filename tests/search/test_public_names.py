"""Public names, and copies of names that must agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from unit_helpers import make_config

import nipq_search

PUBLIC = [
    "ActivationConfig",
    "Budget",
    "QuantConfig",
    "Sweep",
    "SweepConfig",
    "UserError",
    "WeightConfig",
    "apply_bit_config",
    "bit_config",
    "cost_penalty",
    "freeze",
    "param_groups",
    "prepare",
    "profile",
    "reestimate_norm_stats",
    "search",
]


def test_public_names_are_frozen():
    assert nipq_search.__all__ == PUBLIC
    assert dir(nipq_search) == PUBLIC


def test_every_public_name_resolves():
    for name in PUBLIC:
        value = getattr(nipq_search, name)
        assert callable(value) and value.__doc__
        assert value.__name__.split(".")[-1] == name


@pytest.mark.parametrize(
    "lines",
    [
        "from nipq_search import SweepConfig, search",
        "from nipq_search import search, SweepConfig",
        "import nipq_search.search.config.sweep_config; from nipq_search import search",
        "from nipq_search import search; from nipq_search.search.config import space; space.FORMS",
    ],
)
def test_search_can_be_called_whatever_was_imported_before(lines):
    """The package `search` must not hide the function of the same name."""
    code = f"{lines}; assert callable(search)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_search_runs_a_sweep(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("nipq_search.search.run.run_sweep", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr("nipq_search.search.run.Sweep.open", lambda folder: folder)
    config = make_config()
    assert nipq_search.search(config, tmp_path, trials=3) == tmp_path
    assert nipq_search.search(config) == Path("runs/unit")
    assert calls == [((config, tmp_path), {"trials": 3}), ((config, Path("runs/unit")), {})]


def test_unknown_names_are_not_attributes():
    assert not hasattr(nipq_search, "export")
