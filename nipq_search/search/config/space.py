"""The search space: conversion from the sweep file to Optuna distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from nipq_search.cost.projection import units_of
from nipq_search.errors import UserError, nearest
from nipq_search.quant.graph import Graph
from nipq_search.train import HYPERPARAMETERS, TrainConfig

BITS = "bits."
"""Prefix of parameters that are bit-widths, followed by the name of the unit."""

FORMS = ("log", "uniform", "int", "choice")
"""Keys of the entries in `search.space`, which select the kind of distribution."""


def check_space(space: Mapping[Any, Any]) -> None:
    """Check names and forms, and that `TrainConfig` accepts all choices and the ends of ranges.

    Raises:
        UserError: an entry is invalid; the message names the key and the fix.
    """
    for name, form in space.items():
        key = f"search.space.{name}"
        if name not in HYPERPARAMETERS:
            raise UserError(f"{key}: unknown hyperparameter{nearest(str(name), HYPERPARAMETERS)}")
        if not isinstance(form, Mapping):
            raise UserError(
                f"{key}: give a range or a choice, such as {{log: [0.01, 0.1]}}, not {form!r}; "
                f"train.{name} sets one value for all trials"
            )
        for value in ends(distribution(name, form)):
            try:
                TrainConfig().with_hyperparameters({name: value})
            except (UserError, TypeError) as error:
                raise UserError(f"{key}: {value!r} is not allowed ({error})") from error


def ends(distribution: BaseDistribution) -> list[Any]:
    """Return both bounds of a distribution, or all of its choices."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return [distribution.low, distribution.high]


def distribution(name: str, form: Mapping[str, Sequence[Any]]) -> BaseDistribution:
    """Return the Optuna distribution of one hyperparameter.

    Args:
        name: name of the hyperparameter, for error messages.
        form: its entry in `search.space`, such as `{"log": [0.01, 0.1]}`.

    Raises:
        UserError: the form is unknown, or its values are invalid.
    """
    key = f"search.space.{name}"
    if len(form) != 1 or next(iter(form)) not in FORMS:
        given = ", ".join(map(str, form)) or "nothing"
        raise UserError(f"{key}: give one of {', '.join(FORMS)}, not {given}")
    kind, values = next(iter(form.items()))
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{key}.{kind}: give a list, such as [0.01, 0.1], not {values!r}")
    if kind == "choice":
        if not values:
            raise UserError(f"{key}.choice: give at least one value")
        if not all(v is None or isinstance(v, (bool, int, float, str)) for v in values):
            raise UserError(f"{key}.choice: use only numbers, booleans, strings and null")
        return CategoricalDistribution(list(values))
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(values) != 2 or len(numbers) != 2 or numbers[0] >= numbers[1]:
        raise UserError(f"{key}.{kind}: give two numbers, the smaller one first")
    low, high = numbers
    if kind == "int":
        if low != int(low) or high != int(high):
            raise UserError(f"{key}.int: give whole numbers, or use uniform")
        return IntDistribution(int(low), int(high))
    if kind == "log" and low <= 0:
        raise UserError(f"{key}.log: both numbers must be above 0")
    return FloatDistribution(float(low), float(high), log=kind == "log")


def bits_space(graph: Graph) -> dict[str, BaseDistribution]:
    """Return the distributions of the parameters that are bit-widths, by parameter name.

    There is one for every unit with more than one allowed width; see `units_of`.
    """
    found: dict[str, BaseDistribution] = {}
    for unit in units_of(graph):
        allowed = graph.tensors[unit].allowed
        if len(allowed) < 2:
            continue
        consecutive = allowed == tuple(range(allowed[0], allowed[-1] + 1))
        found[BITS + unit] = (
            IntDistribution(allowed[0], allowed[-1])
            if consecutive
            else CategoricalDistribution(allowed)
        )
    return found


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Split a trial's parameters into hyperparameters, and bit-widths by unit."""
    bits = {k.removeprefix(BITS): float(v) for k, v in params.items() if k.startswith(BITS)}
    return {k: v for k, v in params.items() if not k.startswith(BITS)}, bits
