"""Directions of imports between layers, and the folders that may import each library.

Imports are read from the source, so those inside functions count as well.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import import_graph as graph  # noqa: E402

ROOT = graph.ROOT
FILES = sorted(ROOT.rglob("*.py"))
MOST_FILES = 15
"""Maximum number of Python files in a folder, not counting `__init__.py`."""

ONLY_IN = {
    "ray": {"search"},
    "optuna": {"search", "testing"},
    "pydantic": {"search"},
    "mlflow": {"tracking"},
    "plotly": {"report"},
    "sklearn": {"tasks"},
    "typer": {"cli"},
    "pytest": {"testing"},
    "hypothesis": {"testing"},
    "rich": {"cli"},
}
"""The only folders that may import these libraries."""

TORCH_ALONE = ("quant", "cost", "tasks", "train")
"""Folders that require only the core dependencies."""

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
    "quant": {"triton"},  # installed with torch builds for GPUs
}
"""Libraries beyond the core that a folder may import inside functions."""


def folder_of(path: Path, root: Path = ROOT) -> str:
    """Return the first folder below the package, or an empty string for a file at its root."""
    parts = path.relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""


def problems(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Yield the forbidden imports of a file, each with the reason."""
    here = folder_of(path, root)
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    for target in graph.imports(path, root):
        library, _, below = target.partition(".")
        if target == graph.PACKAGE:
            yield f"{target}: import the module itself; the names of the package are for users"
        elif library == graph.PACKAGE:
            if reason := graph.wrong_way(name, below):
                yield f"{target}: {reason}"
        elif library in ONLY_IN and here not in ONLY_IN[library]:
            yield f"{target}: only {', '.join(sorted(ONLY_IN[library]))} may import {library}"
        elif here in TORCH_ALONE and library not in sys.stdlib_module_names:
            if library not in CORE | OPTIONAL.get(here, set()):
                yield f"{target}: {here} requires only torch and numpy"


def test_every_part_of_a_layered_folder_has_its_layer():
    for folder in graph.LAYERS:
        place = ROOT.joinpath(*folder.split(".")) if folder else ROOT
        parts = {
            p.stem for p in place.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
        }
        for part in sorted(parts - {"__init__"}):
            graph.rank(folder, part)


def test_no_folder_is_too_full():
    counts = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert {str(folder): n for folder, n in counts.items() if n > MOST_FILES} == {}


def test_every_package_describes_its_content():
    for path in ROOT.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(text.splitlines()) >= 2, (
            f"{path}: describe the content, and the file to read first"
        )


def test_there_are_no_import_cycles():
    """Check files and packages, ignoring facades, which only collect names."""
    files = graph.import_graph()
    assert graph.cycles(files) == []
    assert graph.cycles(graph.folder_graph(files)) == []


# The root's __init__ imports the public names of all layers lazily; another test checks it.
LAYERED = [path for path in FILES if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", LAYERED, ids=[str(path.relative_to(ROOT)) for path in LAYERED])
def test_imports_point_down(path):
    assert list(problems(path)) == []


def test_a_wrong_import_is_found(tmp_path):
    """Check that the test can fail."""
    for folder in (part for layer in graph.LAYERS[""] for part in layer):
        (tmp_path / folder).mkdir()
    (tmp_path / "errors.py").touch()
    source = tmp_path / "quant" / "tracing.py"
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
    found = [problem.split(":")[0] for problem in problems(source, tmp_path)]
    assert sorted(found) == [
        "nipq_search",
        "nipq_search.cost",
        "nipq_search.quant",  # `from . import trace`, which is no module here
        "nipq_search.train",
        "pandas",
        "ray",
    ]


REVERSED = [
    ("search/jobs/job.py", "nipq_search.search.study.ledger"),
    ("search/worker/worker.py", "nipq_search.search.backend.tune"),
    ("search/coordinator/trials.py", "nipq_search.search.results.sweep"),
    ("search/study/ledger.py", "nipq_search.search.config.space"),
    ("quant/numerics/noise.py", "nipq_search.quant.kernels.cpu"),
    ("quant/quantizers/lsq.py", "nipq_search.quant.config"),
    ("tasks/common/hub.py", "nipq_search.tasks.text.files"),
    ("train/starts/start.py", "nipq_search.train.loop"),
    ("search/jobs/job.py", "nipq_search.search"),
    ("quant/numerics/noise.py", "nipq_search.quant"),
]


@pytest.mark.parametrize(("file", "target"), REVERSED, ids=[file for file, _ in REVERSED])
def test_a_reversed_import_is_found_in_a_copy(tmp_path, file, target):
    copy = tmp_path / "nipq_search"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / file
    assert list(problems(path, copy)) == []
    path.write_text(f"{path.read_text()}\n\ndef late():\n    import {target}\n")
    (problem,) = problems(path, copy)
    assert problem.startswith(f"{target}: ")


def test_a_planted_cycle_is_found_in_a_copy(tmp_path):
    copy = tmp_path / "nipq_search"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "search" / "study" / "journal.py"
    path.write_text(f"{path.read_text()}\nfrom nipq_search.search.study import ledger\n")
    (cycle,) = graph.cycles(graph.import_graph(copy))
    assert "search.study.journal" in cycle and "search.study.ledger" in cycle


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
