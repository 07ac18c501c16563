"""Write measured tables into the documentation."""

from __future__ import annotations

from pathlib import Path


def write_table(page: Path, mark: str, text: str) -> None:
    """Replace the text between `<!-- mark -->` and `<!-- /mark -->` of a page.

    Args:
        page: the Markdown file.
        mark: the name in both markers.
        text: the new text.

    Raises:
        SystemExit: the page lacks the markers.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    head, _, rest = page.read_text().partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{page}: the markers {begin} and {end} are missing; add them")
    page.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}")
