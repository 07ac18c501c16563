"""Normalization of images: as the sweep file says, else as the model knows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nipq_search.tasks.common.arguments import refuse
from nipq_search.tasks.vision.image_folder.transforms import ChannelNormalization


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def normalization(
    known: Mapping[str, Any],
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
) -> ChannelNormalization:
    """The given figures; what is not given is the model's own. `UserError` for what is none."""
    figures = {}
    for key, given in (("mean", mean), ("std", std)):
        value = known.get(key, 0.5) if given is None else given
        if not isinstance(value, int | float | list | tuple):
            value = ()
        values = [value] * 3 if isinstance(value, int | float) else list(value)
        if len(values) != 3 or not all(_is_figure(v) for v in values):
            raise refuse(key, "give one number, or one for each of 3 channels")
        if key == "std" and min(values) <= 0:
            raise refuse(key, "must be above 0")
        figures[key] = tuple(float(v) for v in values)
    return ChannelNormalization(**figures)
