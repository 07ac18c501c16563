"""Arguments of the image task: checked, each with a message that names the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nipq_search.errors import UserError, nearest
from nipq_search.tasks.image_transforms import ChannelNormalization


def check_choice(key: str, value: str | None, known: Sequence[str | None]) -> None:
    """Raise `UserError` for a word that is not among the known ones."""
    if value not in known:
        names = [name for name in known if name is not None]
        raise UserError(f"task_args.{key}: unknown value '{value}'{nearest(str(value), names)}")


def check_number(key: str, value: float, low: float, high: float) -> None:
    """Raise `UserError` for what is no number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"task_args.{key}: {value!r} is no number from {low:g} to {high:g}")


def normalization(
    known: Mapping[str, Any],
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
) -> ChannelNormalization:
    """The given figures; what is not given is the model's own."""
    figures = {}
    for key, given in (("mean", mean), ("std", std)):
        value = known.get(key, 0.5) if given is None else given
        values = [value] * 3 if isinstance(value, int | float) else list(value)
        if len(values) != 3 or not all(isinstance(v, int | float) for v in values):
            raise UserError(f"task_args.{key}: give one number, or one for each of 3 channels")
        if key == "std" and min(values) <= 0:
            raise UserError("task_args.std: must be above 0")
        figures[key] = tuple(float(v) for v in values)
    return ChannelNormalization(**figures)
