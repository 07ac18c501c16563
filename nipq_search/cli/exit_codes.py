"""Exit codes of the command line, as documented in docs/commands.md."""

from __future__ import annotations

SUCCESS = 0
FAILURE = 1
USAGE = 2
SOME_FAILED = 3
MISMATCH = 4
INTERRUPTED = 130
