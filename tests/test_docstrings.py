"""Docstrings of public functions: `Args`, `Returns` and `Raises`, and examples that run."""

from __future__ import annotations

import ast
import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import nipq_search

ROOT = Path(__file__).parents[1] / "nipq_search"
FILES = sorted(set(ROOT.rglob("*.py")) - {ROOT / "cli" / "app.py"})
"""Python files, except the one in which the help of each option documents its parameter."""
LEAST_PARAMETERS = 3
"""A public function with at least this many parameters must have every section."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Yield the public functions of a module and the public methods of its public classes."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, Function) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method


def parameters(function: Function) -> list[str]:
    """Return the names of all parameters except `self` and `cls`."""
    found = function.args
    names = [a.arg for a in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
    names += [a.arg for a in (found.vararg, found.kwarg) if a is not None]
    return [name for name in names if name not in ("self", "cls")]


def is_overload(function: Function) -> bool:
    """Return whether a function is a typing overload or overrides a documented one."""
    names = {getattr(d, "id", getattr(d, "attr", "")) for d in function.decorator_list}
    return bool(names & {"overload", "override"})


def gaps(function: Function) -> Iterator[str]:
    """Yield the sections that the docstring of a function lacks."""
    text = ast.get_docstring(function) or ""
    if "Args:" not in text:
        yield "Args"
        return
    for name in parameters(function):
        if f"\n    {name}:" not in text:
            yield f"Args: {name}"
    returned = ast.unparse(function.returns) if function.returns else "None"
    if returned not in ("None", "NoReturn"):
        wanted = "Yields" if returned.startswith(("Iterator", "Generator")) else "Returns"
        if f"{wanted}:" not in text:
            yield wanted
    own = [n for n in ast.walk(function) if isinstance(n, ast.Raise) and n.exc is not None]
    if own and "Raises:" not in text:
        yield "Raises"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_functions_with_many_parameters_document_all_of_them(path):
    found = [
        f"{name}: {', '.join(missing)}"
        for name, function in public_functions(path)
        if len(parameters(function)) >= LEAST_PARAMETERS and not is_overload(function)
        if (missing := list(gaps(function)))
    ]
    assert found == []


@pytest.mark.parametrize("name", nipq_search.__all__)
def test_public_names_have_an_example_that_runs(name):
    value = getattr(nipq_search, name)
    text = inspect.getdoc(value.__call__ if name == "search" else value) or ""
    assert "Example:" in text
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert test.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
