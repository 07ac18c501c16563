"""Checks for task arguments; each raises `UserError` with a message about `task_args.<key>`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nipq_search.errors import UserError, nearest
from nipq_search.tasks.common.package_files import PREFIX


def argument_error(key: str, problem: str) -> UserError:
    """Return an error about one argument of a task."""
    return UserError(f"task_args.{key}: {problem}")


def positive(key: str, value: Any) -> int:
    """Return `value` if it is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise argument_error(key, f"{value!r} is not a positive integer")
    return value


def positives(key: str, value: Any) -> tuple[int, ...]:
    """Return `value` as a tuple if it is a non-empty list of positive integers."""
    if not isinstance(value, list | tuple) or not value:
        raise argument_error(key, f"{value!r} is not a list of positive integers")
    return tuple(positive(key, number) for number in value)


def integer(key: str, value: Any, low: int, high: int) -> int:
    """Check an integer argument.

    Args:
        key: name of the argument.
        value: its value.
        low: smallest valid value.
        high: largest valid value.

    Returns:
        The value.

    Raises:
        UserError: the value is not an integer in this range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise argument_error(key, f"{value!r} is not an integer from {low} to {high}")
    return value


def sample_limit(key: str, value: Any) -> int | None:
    """Return `value` if it is a positive integer, or None for no limit."""
    return None if value is None else positive(key, value)


def check_limit(key: str, limit: int | None, available: int) -> None:
    """Check that a limit does not exceed the number of samples.

    Args:
        key: name of the argument.
        limit: maximum number of samples to use; None means no limit.
        available: number of samples in the data.

    Raises:
        UserError: the limit exceeds the number of samples.
    """
    if limit is not None and limit > available:
        raise argument_error(key, f"{limit} exceeds the {available} available samples")


def non_empty_string(key: str, value: Any) -> str:
    """Return `value` if it is a non-empty string."""
    if not isinstance(value, str) or not value:
        raise argument_error(key, f"{value!r} is not a non-empty string")
    return value


def number(key: str, value: Any, low: float, high: float = float("inf")) -> float:
    """Check a numeric argument.

    Args:
        key: name of the argument.
        value: its value.
        low: smallest valid value.
        high: largest valid value.

    Returns:
        The value as a float.

    Raises:
        UserError: the value is not a number in this range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        limits = f">= {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
        raise argument_error(key, f"{value!r} is not a number {limits}")
    return float(value)


def one_of(key: str, value: Any, known: Iterable[str]) -> str:
    """Check an argument that has a fixed set of valid values.

    Args:
        key: name of the argument.
        value: its value.
        known: the valid values.

    Returns:
        The value.

    Raises:
        UserError: the value is not one of `known`.
    """
    names = list(known)
    if value not in names:
        raise argument_error(key, f"'{value}' is unknown{nearest(str(value), names)}")
    return str(value)


def text_or_integer(key: str, value: Any) -> str:
    """Return `value` as a string if it is a non-empty string or an integer."""
    if not isinstance(value, str | int) or value == "":
        raise argument_error(key, f"{value!r} is not a non-empty string")
    return str(value)


def flag(key: str, value: Any) -> bool:
    """Return `value` if it is a Boolean."""
    if not isinstance(value, bool):
        raise argument_error(key, f"{value!r} is neither true nor false")
    return value


def seed(key: str, value: Any) -> int:
    """Return `value` if it is a valid seed for numpy's generators."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise argument_error(key, f"{value!r} is not an integer from 0 to {2**32 - 1}")
    return value


def names(key: str, value: Any) -> tuple[str, ...] | None:
    """Return a non-empty list of distinct names as a tuple; None is returned unchanged."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        found = tuple(text_or_integer(key, name) for name in value)
        if found and len(set(found)) == len(found):
            return found
    raise argument_error(key, f"{value!r} is not a list of distinct names")


def mapping(key: str, value: Any) -> dict[str, Any] | None:
    """Return a mapping as a dict; None is returned unchanged."""
    if value is not None and not isinstance(value, Mapping):
        raise argument_error(key, f"{value!r} is not a mapping")
    return None if value is None else dict(value)


def absolute(path: str) -> str:
    """Return a path or pattern in a form that does not depend on the working directory."""
    return path if path.startswith(PREFIX) else str(Path(path).expanduser().absolute())


def paths(key: str, value: Any) -> tuple[str, ...]:
    """Return a path or a list of paths as a tuple of absolute paths."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not found:
        raise argument_error(key, f"{value!r} is neither a path nor a list of paths")
    if not all(isinstance(path, str) and path for path in found):
        raise argument_error(key, f"{value!r} contains an entry that is not a path")
    return tuple(absolute(path) for path in found)


def check_disjoint(key: str, files: Iterable[Any], others: Iterable[Any]) -> None:
    """Check that a split shares no file with the validation split.

    Args:
        key: name of the argument that lists the split's files.
        files: files of the split.
        others: files of the validation split.

    Raises:
        UserError: a file is in both.
    """
    shared = sorted(str(file) for file in set(files) & set(others))
    if shared:
        raise argument_error(
            key, f"{shared[0]} is already in the validation split; use each file in one split only"
        )


SplitSource = float | tuple[str, ...]
"""Origin of a split: a share of the data to hold out, or separate files."""


def split_sources(validation: Any, test: Any) -> tuple[SplitSource, SplitSource]:
    """Return the origins of the validation and test splits.

    Each argument is a share in (0, 1), a path, or a list of paths.

    Returns:
        The origin of the validation split and that of the test split, with absolute paths.

    Raises:
        UserError: an argument is neither a share nor a path, the shares leave no training data, or
            a file is in both splits.
    """
    found: list[SplitSource] = []
    for key, value in (("validation", validation), ("test", test)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            found.append(paths(key, value))
        elif 0 < value < 1:
            found.append(float(value))
        else:
            raise argument_error(key, f"{value!r} is neither a share between 0 and 1 nor a path")
    if sum(source for source in found if isinstance(source, float)) >= 1:
        raise argument_error("validation", "together with test, it leaves no training data")
    if not any(isinstance(source, float) for source in found):
        check_disjoint("test", paths("test", test), paths("validation", validation))
    return found[0], found[1]
