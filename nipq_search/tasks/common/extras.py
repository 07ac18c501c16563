"""Imports of optional libraries, which are installed by the extras of this project."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nipq_search.errors import UserError


@contextlib.contextmanager
def requires_extra(user: str, extra: str) -> Iterator[None]:
    """Turn the `ImportError` for an optional library into a message with the install command.

    Args:
        user: what needs the library, for the message, such as `task text_classification`.
        extra: the extra of this project that installs the library.

    Yields:
        Nothing; the block imports the library.

    Raises:
        UserError: the library is not installed.
    """
    try:
        yield
    except ImportError as error:
        library = (error.name or "a library").partition(".")[0]
        raise UserError(f"{user} needs {library}: pip install 'nipq-search[{extra}]'") from error
