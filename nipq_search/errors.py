"""Errors that people meet: one line each, naming the key or the file and the fix."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong usage or configuration. The command line prints it as one line and exits 2.

    Attributes:
        below: its cause, if it is to cross processes as a value.
    """

    below: BaseException | None = None


def one_line(error: BaseException, most: int = 240) -> str:
    """What an error says, in one line that is cut between words."""
    return textwrap.shorten(str(error), most, placeholder=" ...")


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known word nearest to `word`, or the list of known words."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(names)})" if names else ""
