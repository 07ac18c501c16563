"""User-facing errors: each message is one line that names the key or file and the fix."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


class UserError(ValueError):
    """A usage or configuration error, which commands print on one line before exiting with code 2.

    Attributes:
        below: the underlying exception; set where it must survive pickling, which drops
            `__cause__`.

    Example:
        >>> import nipq_search as ns
        >>> try:
        ...     ns.Budget(bobs=1e9)
        ... except ns.UserError as error:
        ...     print(error)
        unknown cost 'bobs' (did you mean 'bops'?)
    """

    below: BaseException | None = None


def one_line(error: BaseException, most: int = 240) -> str:
    """Return an error's message on one line, cut between words to at most `most` characters."""
    return textwrap.shorten(str(error), most, placeholder=" ...")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return text to append to the error message about an unknown `word`.

    If a known word is similar, the text is ` (did you mean 'x'?)`; otherwise, it lists all known
    words. It is empty if there are none.
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(names)})" if names else ""
