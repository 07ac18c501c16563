"""Structure of the source text: short files, one-line summaries, sentences of readable length."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "nipq_search").rglob("*.py"))
DOCUMENTED = [
    *FILES,
    *(
        path
        for name in ("benchmarks", "dashboards", "docs")
        for path in (ROOT / name).glob("*.py")
    ),
]
PACKAGES = [path for path in FILES if path.name == "__init__.py"]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "dashboards" / "README.md",
    ROOT / "pipelines" / "cluster" / "README.md",
]
MOST_LINES = 400
MOST_WORDS = 45
"""Maximum number of words in a sentence of the documentation."""


def name_of(path: Path) -> str:
    """Return the identifier of a parametrized test."""
    return str(path.relative_to(ROOT))


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line number and the text of every docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(node):
                yield getattr(node, "lineno", 1), text


def sentences(page: Path) -> Iterator[str]:
    """Yield the sentences of a page, without code, tables, headings and link targets."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "<!--"))]
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\d+\. )", "\n".join(lines)):
        yield from re.split(r"(?<=[.:;?])\s+", paragraph.strip())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module_is_short_and_documented(path):
    source = path.read_text()
    lines = source.count("\n")
    assert lines <= MOST_LINES, f"{lines} lines: split the file by concept"
    assert ast.get_docstring(ast.parse(source)), "the module needs a docstring"


@pytest.mark.parametrize("path", DOCUMENTED, ids=name_of)
def test_docstring_summaries_are_one_sentence_on_one_line(path):
    for line, text in docstrings(path):
        summary, _, rest = text.partition("\n")
        assert summary.endswith((".", ":")), f"line {line}: {summary!r} has no final period"
        assert not rest or rest.startswith("\n"), f"line {line}: no blank line after the summary"


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_package_docstrings_name_existing_files(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    for name in re.findall(r"`([\w/]+\.(?:py|c))`", text):
        assert (path.parent / name).is_file(), f"{name}: no such file in the package"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_have_one_title_and_short_sentences(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    assert len(re.findall(r"^# ", text, re.M)) == 1 and text.startswith("# ")
    for sentence in sentences(page):
        count = len(sentence.split())
        assert count <= MOST_WORDS, f"{count} words: {sentence[:80]}..."


def test_constraints_pin_every_package_once():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    names = [pin.partition("==")[0] for pin in pins]
    assert all("==" in pin and "/" not in pin and " " not in pin for pin in pins)
    assert len(names) == len({name.lower().replace("_", "-") for name in names})
