"""Arguments as people type them, turned into values or into one clear error."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from nipq_search.errors import UserError

_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):(\d{1,5})")


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """Limits of `best`, such as `bops=5.3e9` or `weight_bytes=24_000`, by cost name.

    `Sweep.best` checks the names against the costs of its sweep.

    Raises:
        UserError: not NAME=NUMBER, a cost given twice or no positive number.
    """
    limits: dict[str, float] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UserError(f"--max {text}: write COST=NUMBER, for example --max bops=5.3e9")
        if name in limits:
            raise UserError(f"--max {text}: {name} is given twice; keep one of the two")
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
    """The address of a Ray cluster: `auto`, HOST:PORT, or None for a cluster of one's own.

    Raises:
        UserError: anything else, `ray://` above all, where the search would leave this process.
    """
    if address is None or address == "auto":
        return address
    if address.startswith("ray://"):
        raise UserError(
            f"--address {address}: Ray Client addresses are not supported; "
            "use the cluster's own address (HOST:6379) from a machine of the cluster"
        )
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UserError(f"--address {address}: write auto or HOST:PORT, for example 10.0.0.5:6379")
    return address
