"""Parsing and checking of command-line values, with a one-line error for invalid ones."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from nipq_search.errors import UserError

_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):(\d{1,5})")


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """Parse limits for `best`, such as `bops=5.3e9`, and return them by cost name.

    `Sweep.best` checks the names against the costs of the sweep.

    Raises:
        UserError: a limit is not COST=NUMBER or not positive, or a cost is given twice.
    """
    limits: dict[str, float] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UserError(f"--max {text}: write COST=NUMBER, for example --max bops=5.3e9")
        if name in limits:
            raise UserError(f"--max {text}: {name} is given twice; remove one limit")
        limits[name] = _positive(text, value)
    return limits


def _positive(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(
            f"--max {text}: '{value}' is not a positive number; write 5.3e9, 24_000 or 3e6"
        )
    return number


def check_address(address: str | None) -> str | None:
    """Check and return a cluster's address: `auto`, HOST:PORT, or None for a local cluster.

    Raises:
        UserError: the address has a different form. `ray://` is rejected because Ray Client would
            run the driver in another process.
    """
    if address is None or address == "auto":
        return address
    if address.startswith("ray://"):
        raise UserError(
            f"--address {address}: Ray Client addresses are not supported; run the command "
            "on a machine in the cluster, with the address of its head (HOST:6379)"
        )
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UserError(f"--address {address}: write auto or HOST:PORT, for example 10.0.0.5:6379")
    return address
