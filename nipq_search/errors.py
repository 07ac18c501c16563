"""User-facing errors: one line that names the key or file and the fix."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


class UserError(ValueError):
    """An error in usage or configuration; the command line prints it in one line and exits 2.

    Attributes:
        below: the cause, if it must survive pickling, which drops `__cause__`.

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
    """Return an error's message in one line, truncated between words to `most` characters."""
    return textwrap.shorten(str(error), most, placeholder=" ...")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` with the closest known word, or list all known words."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(names)})" if names else ""
