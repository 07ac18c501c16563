"""Where text goes: data to stdout, messages to stderr, colours to terminals only."""

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
"""Width of output that no terminal shows: nothing is folded or cut on its way to `grep`."""


def console(stream: TextIO) -> Console:
    """A rich console on `stream` that prints text as it is: no markup, no emoji, no guesses."""
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


def say(text: str) -> None:
    """Print a message for people on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit_json(document: Any) -> None:
    """Print one JSON document on stdout; figures that are not finite become null."""
    emit_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def emit_table(*renderables: RenderableType) -> None:
    """Print tables and lines on stdout."""
    screen = console(sys.stdout)
    with screen.capture() as capture:
        for renderable in renderables:
            screen.print(renderable)
    # Rich pads its lines; blanks at their ends help nobody.
    emit_text("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def emit_text(text: str) -> None:
    """Print `text` on stdout as it is.

    A reader that left early (`| head`) is no failure: the rest goes nowhere and the command's
    own result decides the exit code.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, so the descriptor itself has to change.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def chatter_on_stderr() -> Iterator[None]:
    """Send what libraries print meanwhile to stderr, so that stdout holds the data alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
