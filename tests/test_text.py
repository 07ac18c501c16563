"""What the source files look like: short, and with a docstring for every module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "nipq_search").rglob("*.py"))
MOST_LINES = 400


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_module_is_short_and_documented(path):
    source = path.read_text()
    lines = source.count("\n")
    assert lines <= MOST_LINES, f"{lines} lines: split the file by concept"
    assert ast.get_docstring(ast.parse(source)), "the module needs a docstring"


def test_constraints_pin_every_package_once():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    names = [pin.partition("==")[0] for pin in pins]
    assert all("==" in pin and "/" not in pin and " " not in pin for pin in pins)
    assert len(names) == len({name.lower().replace("_", "-") for name in names})
