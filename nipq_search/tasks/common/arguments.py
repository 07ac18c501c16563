"""Checks of the arguments of tasks: one line each for whatever is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nipq_search.errors import UserError, nearest
from nipq_search.tasks.common.package_files import PREFIX


def refuse(key: str, problem: str) -> UserError:
    """The error about one argument."""
    return UserError(f"task_args.{key}: {problem}")


def positive(key: str, value: Any) -> int:
    """`value` as an integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refuse(key, f"{value!r} is not an integer of 1 or more")
    return value


def integer(key: str, value: Any, low: int, high: int) -> int:
    """`value` as an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise refuse(key, f"{value!r} is not an integer from {low} to {high}")
    return value


def most(key: str, value: Any) -> int | None:
    """`value` as an integer of 1 or more, or None for no limit."""
    return None if value is None else positive(key, value)


def check_most(key: str, wanted: int | None, there: int) -> None:
    """Raise `UserError` where more samples are asked for than there are."""
    if wanted is not None and wanted > there:
        raise refuse(key, f"{wanted} is more than the {there} there are")


def text(key: str, value: Any) -> str:
    """`value` if it is text and not empty."""
    if not isinstance(value, str) or not value:
        raise refuse(key, f"{value!r} is not a name")
    return value


def number(key: str, value: Any, low: float, high: float = float("inf")) -> float:
    """`value` as a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        limits = f"of {low:g} or more" if high == float("inf") else f"from {low:g} to {high:g}"
        raise refuse(key, f"{value!r} is not a number {limits}")
    return float(value)


def one_of(key: str, value: Any, known: Iterable[str]) -> str:
    """`value` if it is one of the known words."""
    names = list(known)
    if value not in names:
        raise refuse(key, f"'{value}' is unknown{nearest(str(value), names)}")
    return str(value)


def word(key: str, value: Any) -> str:
    """`value` as text, if there is any."""
    if not isinstance(value, str | int) or value == "":
        raise refuse(key, f"{value!r} is not a name")
    return str(value)


def flag(key: str, value: Any) -> bool:
    """`value` if it is true or false."""
    if not isinstance(value, bool):
        raise refuse(key, f"{value!r} is neither true nor false")
    return value


def seed(key: str, value: Any) -> int:
    """`value` as a seed of numpy's generators."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise refuse(key, f"{value!r} is not an integer from 0 to {2**32 - 1}")
    return value


def names(key: str, value: Any) -> tuple[str, ...] | None:
    """`value`, a list of different names, as a tuple; or None."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        found = tuple(word(key, name) for name in value)
        if found and len(set(found)) == len(found):
            return found
    raise refuse(key, f"{value!r} is not a list of different names")


def mapping(key: str, value: Any) -> dict[str, Any] | None:
    """`value` as a mapping, or None."""
    if value is not None and not isinstance(value, Mapping):
        raise refuse(key, f"{value!r} is not a mapping")
    return None if value is None else dict(value)


def place(path: str) -> str:
    """A path or pattern that means the same in every working directory."""
    return path if path.startswith(PREFIX) else str(Path(path).expanduser().absolute())


def paths(key: str, value: Any) -> tuple[str, ...]:
    """`value`, a path or a list of them, as a tuple."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not found:
        raise refuse(key, f"{value!r} is neither a path nor a list of paths")
    if not all(isinstance(path, str) and path for path in found):
        raise refuse(key, f"{value!r} holds something that is no path")
    return tuple(place(path) for path in found)


def distinct(key: str, files: Iterable[Any], others: Iterable[Any]) -> None:
    """Raise `UserError` where a file stands in two splits."""
    shared = sorted(str(file) for file in set(files) & set(others))
    if shared:
        raise refuse(key, f"{shared[0]} validates already; a file belongs to one split")


Part = float | tuple[str, ...]
"""Where a split comes from: a share of the data, or files of its own."""


def parts(validation: Any, test: Any) -> tuple[Part, Part]:
    """`validation` and `test`, each a share in (0, 1) or paths; some data are left to train."""
    found: list[Part] = []
    for key, value in (("validation", validation), ("test", test)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            found.append(paths(key, value))
        elif 0 < value < 1:
            found.append(float(value))
        else:
            raise refuse(key, f"{value!r} is not a share between 0 and 1, nor a path")
    if sum(part for part in found if isinstance(part, float)) >= 1:
        raise refuse("validation", "together with test it leaves nothing to train")
    if not any(isinstance(part, float) for part in found):
        distinct("test", paths("test", test), paths("validation", validation))
    return found[0], found[1]
