"""The picture of docs/architecture.md, drawn from the imports of the library.

    python docs/draw_architecture.py            writes docs/images/architecture.svg
    python docs/draw_architecture.py --check    fails if that file is out of date

Rows are the layers of `import_graph.LAYERS`, boxes are packages and single files. Each box shows
the first line of the docstring and the packages that its files import.
"""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import import_graph

PICTURE = Path(__file__).parent / "images" / "architecture.svg"

WIDTH, MARGIN, GAP, PADDING = 980, 16, 12, 8
LINE = 17
"""Height of a line of text, in pixels like all lengths in this file."""

TITLE_SIZE, TEXT_SIZE = 14, 12.5
CHARACTER_WIDTH = 0.53
"""Mean width of a character of a sans-serif font, as a share of its size."""

STYLE = """\
  text { font-family: Helvetica, Arial, "Liberation Sans", sans-serif }
  tspan { fill: #1f2933 }
  .name { font-size: 14px; font-weight: bold }
  .text { font-size: 12.5px }
  .uses { font-size: 12.5px; fill: #52606d; font-style: italic }
  .sheet { fill: #ffffff; stroke: #cbd2d9 }
  .layer { fill: #eef3f8; stroke: #9fb3c8 }
  .part { fill: #ffffff; stroke: #9fb3c8 }
  .arrow { stroke: #52606d; stroke-width: 1.5; marker-end: url(#tip) }
"""


@dataclass(frozen=True)
class Box:
    """A package or a file in the picture.

    Attributes:
        name: the title, in bold; empty for a list of files.
        purpose: one-line description of the code.
        uses: the packages that it imports, from top to bottom.
        rows: the boxes inside it, row by row from the top.
    """

    name: str
    purpose: str
    uses: tuple[str, ...] = ()
    rows: tuple[tuple[Box, ...], ...] = ()


def purpose(path: Path) -> str:
    """Return the first line of a file's docstring, without markup or the final period."""
    text = ast.get_docstring(ast.parse(path.read_text(), str(path))) or ""
    return text.partition("\n")[0].removesuffix(".").replace("`", "")


def part_uses(graph: Mapping[str, set[str]], folder: str, part: str) -> set[str]:
    """Return the parts of a folder that one of its parts imports.

    Args:
        graph: the imported modules of each module, by dotted names.
        folder: dotted name of the folder; empty for the package itself.
        part: name of a package or a file inside it.
    """
    prefix = f"{folder}." if folder else ""
    own = f"{prefix}{part}"
    found = set()
    for name, targets in graph.items():
        if name == own or name.startswith(f"{own}."):
            inside = (t.removeprefix(prefix) for t in targets if t.startswith(prefix))
            found |= {target.partition(".")[0] for target in inside}
    return found - {part}


def rows_of(folder: str, graph: Mapping[str, set[str]], root: Path) -> tuple[tuple[Box, ...], ...]:
    """Return the boxes of a folder, row by row from the top layer to the bottom.

    Args:
        folder: dotted name of a folder that has an entry in `LAYERS`.
        graph: the imported modules of each module, by dotted names.
        root: folder of the library.
    """
    layers = import_graph.LAYERS[folder]
    order = [part for layer in reversed(layers) for part in layer]
    place = root.joinpath(*folder.split(".")) if folder else root
    files = {path.stem for path in place.glob("*.py")} - {"__init__"}
    rest = sorted(files - set(order))
    rows = []
    for layer in reversed(layers):
        row = []
        for part in layer:
            if part == "*":
                row.append(Box("", ", ".join(f"{name}.py" for name in rest)))
                continue
            uses = part_uses(graph, folder, part)
            shown = tuple(name for name in order if name in uses)
            inside = f"{folder}.{part}" if folder else part
            if (place / part).is_dir():
                inner = rows_of(inside, graph, root) if inside in import_graph.LAYERS else ()
                row.append(Box(f"{part}/", purpose(place / part / "__init__.py"), shown, inner))
            elif part in files:
                row.append(Box(f"{part}.py", purpose(place / f"{part}.py"), shown))
        rows.append(tuple(row))
    return tuple(rows)


def wrapped(text: str, width: float, size: float = TEXT_SIZE) -> list[str]:
    """Break text into lines that fit a width in pixels."""
    return textwrap.wrap(text, max(8, int(width / (size * CHARACTER_WIDTH))))


def content(box: Box, width: float) -> list[list[tuple[str, str]]]:
    """Return the lines of a box: spans of text, each preceded by its CSS class."""
    inner = width - 2 * PADDING
    texts = wrapped(box.purpose, inner)
    if len(wrapped(f"{box.name}  {box.purpose}", 0.9 * inner, TITLE_SIZE)) == 1:
        lines = [[("name", box.name), ("text", box.purpose)]]
    else:
        lines = [[("name", box.name)]] if box.name else []
        lines += [[("text", line)] for line in texts]
    if box.uses:
        uses = wrapped("imports " + ", ".join(box.uses), inner)
        lines += [[("uses", line)] for line in uses]
    return lines


def column(width: float, boxes: Sequence[Box]) -> float:
    """Return the width of each box in a row of a given total width, in pixels."""
    return (width - GAP * (len(boxes) - 1)) / len(boxes)


def height(box: Box, width: float) -> float:
    """Return the height of a box at a given width, in pixels."""
    total = 2 * PADDING + LINE * len(content(box, width))
    inner = width - 2 * PADDING
    for row in box.rows:
        total += GAP + max(height(inside, column(inner, row)) for inside in row)
    return total


def draw_box(box: Box, place: tuple[float, float, float, float], style: str) -> list[str]:
    """Return the SVG elements of a box and of those inside it.

    Args:
        box: the box.
        place: left, top, width and height, in pixels.
        style: CSS class of its rectangle.
    """
    left, top, width, tall = place
    found = [
        f'<rect class="{style}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
        f'height="{tall:.1f}" rx="5"/>'
    ]
    y = top + PADDING
    for line in content(box, width):
        y += LINE
        spans = "".join(
            f'<tspan class="{kind}"{shift}>{escape(text)}</tspan>'
            for (kind, text), shift in zip(line, ("", ' dx="10"'), strict=False)
        )
        found.append(f'<text x="{left + PADDING:.1f}" y="{y - 4:.1f}">{spans}</text>')
    found += draw_rows(box.rows, (left + PADDING, y + GAP, width - 2 * PADDING), "part")[0]
    return found


def draw_rows(
    rows: Sequence[Sequence[Box]], place: tuple[float, float, float], style: str
) -> tuple[list[str], float]:
    """Draw rows of boxes below each other, with an arrow from each row to the next.

    Args:
        rows: the boxes, from the top row to the bottom.
        place: left, top and width, in pixels.
        style: CSS class of the boxes' rectangles.

    Returns:
        The SVG elements, and where the next row would begin, in pixels from the top.
    """
    left, top, width = place
    found = []
    for number, row in enumerate(rows):
        each = column(width, row)
        tall = max(height(box, each) for box in row)
        for index, box in enumerate(row):
            found += draw_box(box, (left + index * (each + GAP), top, each, tall), style)
        top += tall + GAP
        if number < len(rows) - 1:
            middle = left + width / 2
            found.append(
                f'<line class="arrow" x1="{middle:.1f}" y1="{top - GAP:.1f}" '
                f'x2="{middle:.1f}" y2="{top - 1:.1f}"/>'
            )
    return found, top


def draw(root: Path = import_graph.ROOT) -> str:
    """Return the picture of a library as SVG text.

    Args:
        root: folder of the library.
    """
    graph = import_graph.import_graph(root)
    legend = "Imports point down only: a package imports from the rows below it, as listed."
    parts, bottom = draw_rows(
        rows_of("", graph, root), (MARGIN, 2 * MARGIN + LINE, WIDTH - 2 * MARGIN), "layer"
    )
    tall = bottom - GAP + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall:.0f}" '
            f'width="{WIDTH}" height="{tall:.0f}" role="img">',
            "<title>Packages of nipq_search and the directions of their imports</title>",
            f"<style>\n{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
            'markerHeight="6" orient="auto"><path d="M0 0 8 4 0 8z" fill="#52606d"/></marker>'
            "</defs>",
            f'<rect class="sheet" x="0.5" y="0.5" width="{WIDTH - 1}" height="{tall - 1:.0f}" '
            'rx="8"/>',
            f'<text x="{MARGIN}" y="{MARGIN + LINE - 3}"><tspan class="text">{escape(legend)}'
            "</tspan></text>",
            *parts,
            "</svg>",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture, or check that it is current; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    arguments = parser.parse_args(argv)
    text = draw()
    if not arguments.check:
        PICTURE.write_text(text)
    elif not PICTURE.is_file() or PICTURE.read_text() != text:
        print(f"{PICTURE}: outdated; run python docs/draw_architecture.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
