"""Formatting of values for display; numbers that are missing or not finite become `-`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeGuard

NOTHING = "-"

_STEPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def known(value: float | None) -> TypeGuard[float]:
    """Return whether a number exists and is finite."""
    return value is not None and math.isfinite(value)


def bops(value: float | None) -> str:
    """Format bit operations with a decimal prefix: `5.30 GBOPs`."""
    if not known(value):
        return NOTHING
    for step, letter in _STEPS:
        if value >= step:
            return f"{value / step:.2f} {letter}BOPs"
    return f"{value:.0f} BOPs"


def kilobytes(value: float | None) -> str:
    """Format a number of bytes in kilobytes (`24.0 kB`), or in bytes below 10,000 (`9,216 B`)."""
    if not known(value):
        return NOTHING
    return f"{value:,.0f} B" if value < 10_000 else f"{value / 1000:,.1f} kB"


def megabytes(value: float | None) -> str:
    """Format a number of bytes in megabytes (1,000,000 bytes), rounded up: `1,200 MB`."""
    return f"{math.ceil(value / 1e6):,} MB" if known(value) else NOTHING


def metric(value: float | None) -> str:
    """Format a task's metric with four decimals."""
    return f"{value:.4f}" if known(value) else NOTHING


def bits(value: float | None) -> str:
    """Format a bit-width: a float with two decimals (`3.42`), an integer as is (`4`)."""
    if not known(value):
        return NOTHING
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def count(value: float | None) -> str:
    """Format a count with thousands separators: `1,200,000`."""
    return f"{value:,.0f}" if known(value) else NOTHING


def share(value: float | None) -> str:
    """Format a fraction as a percentage: `98.2 %`."""
    return f"{100 * value:.1f} %" if known(value) else NOTHING


def mean_bits(value: float | None) -> str:
    """Format a mean bit-width with its unit: `3.42 bits`."""
    return f"{value:.2f} bits" if known(value) else NOTHING


COST_FORMATS: Mapping[str, Callable[[float | None], str]] = {
    "bops": bops,
    "bytes": kilobytes,
    "bits": mean_bits,
}
"""The formatting function for each unit of a cost; the unit is the last word of the cost's name.

For example, `weight_bytes` is in bytes. Costs in any other unit, such as those of plug-ins, are
printed with four significant digits.
"""


def cost(name: str, value: float | None) -> str:
    """Format a cost according to the unit at the end of its name; see `COST_FORMATS`."""
    if form := COST_FORMATS.get(name.rpartition("_")[2]):
        return form(value)
    return f"{value:.4g}" if known(value) else NOTHING


def costs(values: Mapping[str, float] | None) -> str:
    """Format several costs on one line: `bops 5.30 GBOPs, weight_bytes 24.0 kB`.

    The result is empty if there are no costs.
    """
    return ", ".join(f"{name} {cost(name, value)}" for name, value in (values or {}).items())


def duration(seconds: float | None) -> str:
    """Format a duration in hours and minutes (`2 h 5 min`), or in seconds below a minute."""
    if not known(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def setting(value: object) -> str:
    """Format a hyperparameter: floats with four significant digits, other values unchanged."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def one_line(text: str | None) -> str:
    """Put `text` on one line; replace unprintable characters, which could control a terminal.

    A missing or empty text becomes `-`.
    """
    words = " ".join((text or NOTHING).split())
    return "".join(letter if letter.isprintable() else "?" for letter in words)
