"""The layers of the library, and its actual imports, which are read from the source.

`tests/test_layers.py` compares the imports with `LAYERS`, and `docs/draw_architecture.py` draws
both of them. Imports inside functions count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PACKAGE = "nipq_search"
ROOT = Path(__file__).parents[1] / PACKAGE

LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "": (
        ("errors", "records", "registry", "file_io", "blobs", "version"),
        ("quant",),
        ("cost",),
        ("tasks",),
        ("train",),
        ("tracking", "report"),
        ("search",),
        ("cli",),
        ("testing",),
    ),
    "quant": (
        ("numerics",),
        ("kernels",),
        ("quantizers",),
        ("config", "graph", "tracing"),
        ("insertion",),
        ("tools",),
    ),
    "tasks": (("base", "common"), ("vision", "text")),
    "train": (("stability", "starts"), ("*",)),
    "search": (
        ("jobs", "strategies"),
        ("config", "study"),
        ("worker", "coordinator", "results"),
        ("backend",),
        ("checks",),
        ("commands", "monitor"),
        ("run",),
    ),
}
"""The parts of each folder from bottom to top; "*" stands for all parts not listed.

A part imports only from parts in earlier layers. Parts of the same layer do not import each other,
except single files at the root and in "*".
"""


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the file of every module by its dotted name; the package itself has an empty name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Yield the dotted names that a file imports: `a.b` for `from a import b` if b is a module."""
    package = [PACKAGE, *path.relative_to(root).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                place = root.joinpath(*module.split(".")[1:], alias.name)
                inside = module.split(".")[0] == PACKAGE
                is_module = inside and (place.is_dir() or place.with_suffix(".py").is_file())
                yield f"{module}.{alias.name}" if is_module else module


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Return the modules that each module imports, without facades (`__init__` files)."""
    known = modules(root)
    graph = {}
    for name, path in known.items():
        if path.name == "__init__.py":
            continue
        targets = {n.partition(".")[2] for n in imports(path, root) if n.split(".")[0] == PACKAGE}
        graph[name] = (targets & known.keys()) - {name}
    return graph


def folder_graph(graph: Mapping[str, Iterable[str]], root: Path = ROOT) -> dict[str, set[str]]:
    """Return the folders that each folder imports from, except its own parents and subfolders."""
    known = modules(root)

    def folder(name: str) -> str:
        return name if known[name].name == "__init__.py" else name.rpartition(".")[0]

    found: dict[str, set[str]] = {}
    for name, targets in graph.items():
        here = folder(name)
        for there in map(folder, targets):
            if not f"{there}.".startswith(f"{here}.") and not f"{here}.".startswith(f"{there}."):
                found.setdefault(here, set()).add(there)
    return found


def cycles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the strongly connected components that have several nodes (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def rank(folder: str, part: str) -> int | None:
    """Return the layer of a part of a folder, or None if the folder has no layers.

    Raises:
        KeyError: the part is missing from `LAYERS`.
    """
    layers = LAYERS.get(folder)
    if layers is None:
        return None
    for height, parts in enumerate(layers):
        if part in parts or "*" in parts:
            return height
    raise KeyError(f"{PACKAGE}/{folder}: add {part} to LAYERS in docs/import_graph.py")


def wrong_way(name: str, target: str) -> str | None:
    """Return why a module must not import another one of the package, or None if it may.

    Args:
        name: dotted name of the importing module, without the package.
        target: dotted name of the imported module or package, without the package.
    """
    here, there = name.split("."), target.split(".")
    for depth, (own, other) in enumerate(zip(here, there, strict=False)):
        if own == other:
            continue
        folder = ".".join(here[:depth])
        below, above = rank(folder, other), rank(folder, own)
        if below is None or above is None or below < above:
            return None
        loose = "*" in LAYERS[folder][above] or (not folder and above == 0)
        if below == above and loose:
            return None
        return f"{own} is not above {other} in {'/'.join([PACKAGE, *here[:depth]])}"
    if target in LAYERS and name.startswith(f"{target}."):
        return f"{own} imports the facade of {target}, which may import {name}"
    return None
