"""Imports point down the layers only, and each outside library has its one place.

Imports are read from the source, so those inside functions count as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "nipq_search"
FILES = sorted(ROOT.rglob("*.py"))

RANK = {
    "cli": 6,
    "search": 5,
    "tracking": 4,
    "report": 4,
    "train": 3,
    "tasks": 2,
    "cost": 2,
    "quant": 1,
}
"""Layer of each folder; single files beside them are layer 0."""

ONLY_IN = {
    "ray": {"search"},
    "optuna": {"search"},
    "pydantic": {"search"},
    "mlflow": {"tracking"},
    "plotly": {"report"},
    "sklearn": {"tasks"},
    "typer": {"cli"},
    "rich": {"cli"},
}
"""Folders that may import these libraries; any other may not."""

TORCH_ALONE = ("quant", "cost", "tasks", "train")
"""Folders that work where nothing but the core dependencies is installed."""

CORE = {"torch", "numpy"}
OPTIONAL = {
    "tasks": {
        "sklearn",
        "huggingface_hub",
        "timm",
        "PIL",
        "safetensors",
        "pyarrow",
        "torchmetrics",
        "transformers",
    },
    "cost": {"pandas", "scipy"},
    "quant": {"triton"},  # comes with torch where there are GPUs
}
"""What a folder may import beyond the core, inside the function that needs it."""


def folder_of(path: Path) -> str:
    """First folder below the package, or an empty string for a file beside the folders."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else ""


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports; `from a import b` gives `a.b` where b is a module."""
    package = ["nipq_search", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                place = ROOT.joinpath(*module.split(".")[1:], alias.name)
                inside = module.split(".")[0] == "nipq_search"
                is_module = inside and (place.is_dir() or place.with_suffix(".py").is_file())
                yield f"{module}.{alias.name}" if is_module else module


def own_target(name: str) -> str | None:
    """Folder that an import of the package leads to; None for an outside library."""
    parts = name.split(".")
    if parts[0] != "nipq_search":
        return None
    if len(parts) == 1:
        return "nipq_search"
    return parts[1] if (ROOT / parts[1]).is_dir() else ""


def problems(path: Path) -> Iterator[str]:
    """What is wrong with the imports of one file."""
    here = folder_of(path)
    for name in imports(path):
        library, target = name.split(".")[0], own_target(name)
        if target == "nipq_search":
            yield f"{name}: import the module itself, the package's names are for users"
        elif target is not None:
            if target != here and RANK.get(target, 0) >= RANK.get(here, 0) and target:
                yield f"{name}: {here or 'layer 0'} is not above {target}"
        elif library in ONLY_IN and here not in ONLY_IN[library]:
            yield f"{name}: only {', '.join(sorted(ONLY_IN[library]))} may import {library}"
        elif here in TORCH_ALONE and library not in sys.stdlib_module_names:
            if library not in CORE | OPTIONAL.get(here, set()):
                yield f"{name}: {here} works with torch alone"


def test_every_folder_has_a_layer():
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(RANK)


# The root's __init__ gathers the public names of every layer, lazily; another test holds it.
LAYERED = [path for path in FILES if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", LAYERED, ids=[str(path.relative_to(ROOT)) for path in LAYERED])
def test_imports_point_down(path):
    assert list(problems(path)) == []


def test_a_wrong_import_is_found(monkeypatch, tmp_path):
    """The reader itself is checked, for a test that never fails proves nothing."""
    for folder in RANK:
        (tmp_path / folder).mkdir()
    (tmp_path / "errors.py").touch()
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    source = tmp_path / "quant" / "wrong.py"
    source.write_text(
        "import nipq_search\n"
        "import os, torch\n"
        "from nipq_search import cost, errors\n"
        "from nipq_search.quant.quantizers.nipq import NIPQ\n"
        "from .. import train\n"
        "from . import trace\n"
        "def late():\n"
        "    import pandas\n"
        "    from ray import tune\n"
    )
    found = [problem.split(":")[0] for problem in problems(source)]
    assert sorted(found) == [
        "nipq_search",
        "nipq_search.cost",
        "nipq_search.train",
        "pandas",
        "ray",
    ]


WITHOUT = """
import importlib, pkgutil, sys
for name in {absent!r}:
    sys.modules[name] = None
for folder in {folders!r}:
    package = importlib.import_module(f"nipq_search.{{folder}}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
"""


def test_core_works_with_torch_alone():
    absent = [*ONLY_IN, *OPTIONAL["tasks"], "pandas", "pyarrow", "yaml", "scipy"]
    code = WITHOUT.format(absent=absent, folders=[f for f in TORCH_ALONE if (ROOT / f).is_dir()])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False
    )
    assert result.returncode == 0, result.stderr
