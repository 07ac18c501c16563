"""Tasks: the model, the data, the loss and the metric of a sweep.

A sweep file selects a task by its key in `TASKS`, which other packages can extend through entry
points, or by the name of a user-defined class, `package.module:Class`. `task_args` are the keyword
arguments of the class. Start with `base.py`, which defines the protocol, and `vision/digits.py`,
the smallest task. Imports only `quant`, `registry` and `errors`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from nipq_search.errors import UserError, nearest
from nipq_search.registry import Registry
from nipq_search.tasks.base import Task, check_task, unreadable
from nipq_search.tasks.common.sections import flat_parameters, group_arguments
from nipq_search.tasks.text.classification import TextClassification
from nipq_search.tasks.text.language_modeling import (
    CausalLanguageModeling,
    MaskedLanguageModeling,
)
from nipq_search.tasks.vision.digits import Digits
from nipq_search.tasks.vision.fashion_mnist import FashionMnist
from nipq_search.tasks.vision.image_folder.task import ImageFolder

__all__ = ["TASKS", "Task", "check_task", "make_task"]


def _problem(name: str, value: Any) -> str | None:
    """Return why a value cannot be registered as a task, or None if it can."""
    return None if callable(value) else "not a class or function that builds a task"


TASKS: Registry[Callable[..., Task]] = Registry(
    "task",
    group="nipq_search.tasks",
    check=_problem,
    hint="; name a user-defined class as package.module:Class",
)
"""The tasks that a sweep file can select by a key, without naming a module."""

TASKS.register("digits", Digits)
TASKS.register("fashion_mnist", FashionMnist)
TASKS.register("image_folder", ImageFolder)
TASKS.register("text_classification", TextClassification)
TASKS.register("masked_lm", MaskedLanguageModeling)
TASKS.register("causal_lm", CausalLanguageModeling)


def make_task(name: str, args: Mapping[str, Any] | None = None) -> Task:
    """Build the task that a sweep file names.

    Args:
        name: a key of `TASKS`, or `package.module:Class`; the module can be in the current
            directory.
        args: keyword arguments of the class, `task_args` in the sweep file. Fields of the class's
            `argument_sections` are not nested; see `nipq_search.tasks.common.sections`.

    Returns:
        The task, which has every required member.

    Raises:
        UserError: the name, module or class is unknown, an argument is invalid, or the class is
            not a task.
    """
    factory = _import_class(name) if ":" in name else TASKS.lookup(name, "task")
    arguments = dict(args or {})
    _check_arguments(name, factory, arguments)
    try:
        task = factory(**group_arguments(factory, arguments))
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"task_args: {unreadable(error)}") from error
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"task_args: {name} rejects {arguments} ({reason})") from error
    check_task(task)
    return task


def _check_arguments(
    name: str, factory: Callable[..., Task], arguments: Mapping[str, Any]
) -> None:
    """Raise `UserError` for an argument that the class does not accept or that is missing."""
    parameters = flat_parameters(factory).values()
    keys = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in arguments:
        if key not in keys and not takes_any:
            raise UserError(f"task_args.{key}: {name} has no such argument{nearest(key, keys)}")
    for parameter in parameters:
        required = parameter.name in keys and parameter.default is parameter.empty
        if required and parameter.name not in arguments:
            raise UserError(f"task_args.{parameter.name}: {name} needs this argument")


def _import_class(name: str) -> Callable[..., Task]:
    """Return the class named by `package.module:Class`."""
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        raise UserError(f"task: '{name}' is not of the form package.module:Class")
    module = _import_module(module_name)
    found = getattr(module, class_name, None)
    if not callable(found):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise UserError(
            f"task: module {module_name} has no class '{class_name}'{nearest(class_name, classes)}"
        )
    factory: Callable[..., Task] = found
    return factory


def _import_module(name: str) -> ModuleType:
    """Import a module, with the current directory as the last entry of the search path."""
    directory = os.getcwd()
    added = directory not in sys.path
    if added:
        sys.path.append(directory)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if added:
            sys.path.remove(directory)
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise UserError(
                f"task: no module named '{missing}', neither installed nor in {directory}"
            ) from error
        raise UserError(
            f"task: importing {name} failed with {type(error).__name__}: {error}"
        ) from error
