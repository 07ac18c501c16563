"""Layer patterns, which select layers to pin, exclude or include by name, kind or order."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nipq_search.errors import UserError, nearest
from nipq_search.quant.config import FLOAT, QuantConfig

KIND, ORDER = "kind:", "order:"
"""Prefixes of patterns that select layers by kind or by order instead of by name."""


class LayerName(NamedTuple):
    """Properties of a layer that patterns match.

    Attributes:
        name: name of the layer.
        kind: `conv2d`, `linear` and so on.
        has_weight: whether the layer multiplies by a weight or looks up its rows.
    """

    name: str
    kind: str
    has_weight: bool


class Pin(NamedTuple):
    """Pin of a layer.

    Attributes:
        bits: bit-width in bits, `float`, or None if the layer is not pinned.
        float_reason: reason why the layer stays in float, or empty.
    """

    bits: int | str | None
    float_reason: str = ""


def matching(pattern: str, layers: Sequence[LayerName]) -> set[int]:
    """Return the indices of the layers that match a pattern.

    Args:
        pattern: a layer name with `fnmatch` wildcards; `kind:` and a kind with wildcards; or
            `order:first` or `order:last` for the first or last layer with a weight that is not an
            embedding.
        layers: the model's layers, in order of execution.

    Returns:
        Indices into `layers`; empty if no layer matches.
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
    """Check that every pattern matches a layer.

    Args:
        patterns: layer patterns.
        layers: the model's layers, in order of execution.
        key: key of the setting, for messages.

    Raises:
        UserError: a pattern matches no layer.
    """
    for pattern in patterns:
        if matching(pattern, layers):
            continue
        if pattern.startswith(KIND):
            kinds = sorted({layer.kind for layer in layers})
            raise UserError(
                f"{key}.{pattern}: no layer of this kind; the model has {', '.join(kinds)}"
            )
        if pattern.startswith(ORDER):
            raise UserError(
                f"{key}.{pattern}: no layer has this order; use order:first or order:last"
            )
        hint = nearest(pattern.strip("*"), [layer.name for layer in layers])
        raise UserError(f"{key}.{pattern}: no layer has this name{hint}")


def pins_of(layers: Sequence[LayerName], config: QuantConfig) -> list[Pin]:
    """Return the pin of every layer, from `pin`, `exclude` and `include`.

    Raises:
        UserError: a pattern matches no layer.
    """
    check_patterns(config.pin, layers, "quant.pin")
    check_patterns(config.exclude, layers, "quant.exclude")
    check_patterns(config.include, layers, "quant.include")
    pins: list[Pin] = [Pin(None)] * len(layers)
    for pattern, bits in reversed(list(config.pin.items())):  # the first matching pattern wins
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
