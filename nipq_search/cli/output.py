"""Output streams: data on stdout, messages on stderr, colors only on terminals."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPE_COLUMNS = 1000
"""Width of output to pipes and files, large enough that no line is wrapped or truncated."""


def console(stream: TextIO) -> Console:
    """Create a Rich console that interprets no markup or emoji codes and highlights nothing."""
    from rich.console import Console

    terminal = stream.isatty()
    return Console(
        file=stream,
        force_terminal=terminal,
        width=None if terminal else PIPE_COLUMNS,
        markup=False,
        emoji=False,
        highlight=False,
    )


def print_message(text: str) -> None:
    """Print a message for the user on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit_json(document: Any) -> None:
    """Print one JSON document on stdout; non-finite numbers become null."""
    emit_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def emit_table(*renderables: RenderableType) -> None:
    """Print tables and lines on stdout."""
    screen = console(sys.stdout)
    with screen.capture() as capture:
        for renderable in renderables:
            screen.print(renderable)
    # Strip the padding that rich adds to every line.
    emit_text("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def emit_text(text: str) -> None:
    """Print `text` on stdout verbatim.

    If stdout is a pipe whose reader has exited (`| head`), the rest of the output is discarded and
    the exit code does not change.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout again on exit, so redirect the file descriptor itself.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def library_output_on_stderr() -> Iterator[None]:
    """Redirect stdout to stderr in this context, so that libraries print nothing to stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _finite(value: Any) -> Any:
    """Return a copy of a document with None in place of non-finite numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
