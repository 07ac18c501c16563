"""Exit codes of the command line, as docs/commands.md promises them."""

from __future__ import annotations

FINE = 0
FAILURE = 1
USAGE = 2
SOME_FAILED = 3
MISMATCH = 4
INTERRUPTED = 130
