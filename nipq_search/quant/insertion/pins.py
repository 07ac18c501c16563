"""Which layers a configuration pins, leaves out or takes in, by name, kind or place."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nipq_search.errors import UserError, nearest
from nipq_search.quant.config import FLOAT, QuantConfig

KIND, ORDER = "kind:", "order:"
"""How patterns begin that do not mean the name."""


class LayerName(NamedTuple):
    """What patterns look at."""

    name: str
    kind: str
    has_weight: bool


class Pin(NamedTuple):
    """The pin of a layer: a bit-width, `float` or None; and why it is in float."""

    bits: int | str | None
    why: str = ""


def matching(pattern: str, layers: Sequence[LayerName]) -> set[int]:
    """Indices of the layers that a pattern means.

    Args:
        pattern: a pattern of names as in `fnmatch`; or `kind:` and one of kinds; or `order:first`
            and `order:last`, the first and the last layer that multiplies by a weight.
        layers: the model's layers, in order of execution.
    """
    if pattern.startswith(KIND):
        wanted = pattern.removeprefix(KIND)
        return {i for i, layer in enumerate(layers) if fnmatch.fnmatchcase(layer.kind, wanted)}
    if pattern.startswith(ORDER):
        with_weight = [
            i for i, layer in enumerate(layers) if layer.has_weight and layer.kind != "embedding"
        ]
        ends = {"first": with_weight[:1], "last": with_weight[-1:]}
        return set(ends.get(pattern.removeprefix(ORDER), []))
    return {i for i, layer in enumerate(layers) if fnmatch.fnmatchcase(layer.name, pattern)}


def check_patterns(patterns: Iterable[str], layers: Sequence[LayerName], key: str) -> None:
    """Raise `UserError` for a pattern that matches no layer."""
    for pattern in patterns:
        if matching(pattern, layers):
            continue
        if pattern.startswith(KIND):
            kinds = sorted({layer.kind for layer in layers})
            raise UserError(
                f"{key}.{pattern}: no layer of this kind; there are {', '.join(kinds)}"
            )
        if pattern.startswith(ORDER):
            raise UserError(f"{key}.{pattern}: unknown place; use order:first or order:last")
        hint = nearest(pattern.strip("*"), [layer.name for layer in layers])
        raise UserError(f"{key}.{pattern}: no layer has such a name{hint}")


def pins_of(layers: Sequence[LayerName], config: QuantConfig) -> list[Pin]:
    """The pin of every layer.

    Raises:
        UserError: a pattern matches no layer.
    """
    check_patterns(config.pin, layers, "quant.pin")
    check_patterns(config.exclude, layers, "quant.exclude")
    check_patterns(config.include, layers, "quant.include")
    pins: list[Pin] = [Pin(None)] * len(layers)
    for pattern, bits in reversed(list(config.pin.items())):  # the first that matches counts
        for index in matching(pattern, layers):
            pins[index] = Pin(bits, f"pinned to float by {pattern}" if bits == FLOAT else "")
    for pattern in config.exclude:
        for index in matching(pattern, layers):
            pins[index] = Pin(FLOAT, f"excluded by {pattern}")
    if config.include:
        kept = set[int]().union(*(matching(pattern, layers) for pattern in config.include))
        for index in set(range(len(layers))) - kept:
            pins[index] = Pin(FLOAT, "not in quant.include")
    return pins
