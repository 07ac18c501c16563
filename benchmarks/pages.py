"""Tables in the documentation, written by the benchmarks that measure them."""

from __future__ import annotations

from pathlib import Path


def write_table(page: Path, mark: str, text: str) -> None:
    """Put `text` between `<!-- mark -->` and `<!-- /mark -->` of a page."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    head, _, rest = page.read_text().partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{page}: has no {begin} and {end} to write between")
    page.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}")
