"""Proposed and enqueued trials, and the suggestion of their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from nipq_search.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A trial that the sampler proposed or a user enqueued.

    Attributes:
        number: trial number.
        budget: index of its budget.
        params: its other parameters: hyperparameters and, with `search.bits`, bit-widths.
        enqueued: whether a user enqueued it.
    """

    number: int
    budget: int
    params: Mapping[str, Any]
    enqueued: bool = False


class RejectedTrial(UserError):
    """An enqueued trial has values that cannot be used."""

    def __init__(self, number: int, reason: str) -> None:
        """Store the trial's number; `reason` is the message."""
        super().__init__(reason)
        self.number = number


def suggest(trial: optuna.trial.Trial, name: str, distribution: BaseDistribution) -> Any:
    """Return the value that Optuna suggests for a parameter, using only its public methods.

    Args:
        trial: the trial.
        name: name of the parameter.
        distribution: its distribution.

    Returns:
        The suggested value.
    """
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
