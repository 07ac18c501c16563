"""Sections of task arguments: a flat `task_args` mapping grouped into frozen dataclasses.

The constructor of a task with many arguments takes them in sections, which are dataclasses such as
`ImageData`. The class lists its sections in `argument_sections`, which maps a constructor
parameter to its section class. Sections do not appear in sweep files: `task_args` contains the
fields of all sections and the remaining parameters side by side, so their names must be distinct.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def argument_sections(factory: Callable[..., object]) -> Mapping[str, type]:
    """Return the section class of each constructor parameter that takes a section."""
    sections: Mapping[str, type] = getattr(factory, "argument_sections", {})
    return sections


def flat_parameters(factory: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """Return the parameters that `task_args` can set, with sections replaced by their fields."""
    sections = argument_sections(factory)
    found: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        fields = inspect.signature(sections[name]).parameters if name in sections else None
        found.update({name: parameter} if fields is None else fields)
    return found


def group_arguments(
    factory: Callable[..., object], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keyword arguments for the constructor, with each section built from its fields.

    Raises:
        UserError: the value of a field is invalid.
    """
    remaining = dict(arguments)
    grouped = {}
    for name, section in argument_sections(factory).items():
        keys = inspect.signature(section).parameters
        grouped[name] = section(**{key: remaining.pop(key) for key in keys if key in remaining})
    return {**remaining, **grouped}


def store(section: object, **values: Any) -> None:
    """Set fields of a frozen section to checked values; for use in its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(section, name, value)
