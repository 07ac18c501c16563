"""The command `nipq-search`, which parses arguments, calls the library and prints results.

Start reading in `app.py`, which declares the commands. `main` maps every outcome to an exit code
of `exit_codes.py` and every error to one line on stderr. This package may import every other
layer.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from nipq_search.cli.exit_codes import FAILURE, INTERRUPTED, SUCCESS, USAGE
from nipq_search.errors import UserError

DEBUG = "NIPQ_DEBUG"
"""Environment variable that, if set to `1`, shows the traceback of every error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; without arguments, print the help.

    Args:
        argv: arguments without the program's name; defaults to `sys.argv[1:]`.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the parent process closed the stream
            setattr(sys, name, open(os.devnull, "w"))
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        from nipq_search.cli.app import app

        # With standalone mode off, typer returns the command's exit code and raises errors
        # instead of printing them over several lines.
        return int(app(args=arguments, prog_name="nipq-search", standalone_mode=False) or SUCCESS)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            traceback.print_exc()
        return _explain(error)


def _explain(error: Exception) -> int:
    """Print `error` as one line on stderr and return its exit code."""
    if type(error).__name__ == "Abort":  # raised by some versions of typer on Ctrl-C
        return INTERRUPTED
    if isinstance(error, UserError):
        return _fail(str(error), USAGE)
    if hasattr(error, "format_message"):  # a usage error of typer
        return _fail(f"{error.format_message()} (see nipq-search --help)", USAGE)
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.partition(".")[0]
        if module != "nipq_search":
            fix = "install it with: python -m pip install 'nipq-search[all]'"
            return _fail(f"the package {module} is not installed; {fix}", FAILURE)
    # If the search cannot continue, it raises a RuntimeError whose message is meant for users.
    kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
    return _fail(f"{kind}{error} ({DEBUG}=1 shows the traceback)", FAILURE)


def _fail(text: str, code: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code
