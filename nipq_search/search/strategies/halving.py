"""Successive halving inside each budget, as pure functions of what rungs measured.

Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning" (arXiv 1810.05934): a
trial that pauses at a rung goes on as soon as it is among the best of those that got there.
Trials under different budgets are never compared: the cheaper ones would always lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ETA = 3
"""One of so many trials at a rung goes on."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A trial and what it reached.

    Attributes:
        number: of the trial.
        bracket: its budget; only trials of one bracket compete.
        metrics: what it measured at each rung so far, the greater the better.
        paused: whether it waits at the last of them for a decision.
        pruned: whether it was told to stop there.
    """

    number: int
    bracket: int
    metrics: Sequence[float]
    paused: bool
    pruned: bool = False


def to_promote(standings: Sequence[Standing], last: bool) -> int | None:
    """The paused trial that goes on; higher rungs first. None where none does.

    Args:
        standings: every trial that has reached a rung, whatever became of it.
        last: whether no further trial will come. Then the best of a rung goes on even where there
            are too few for `ETA`, unless one of its bracket has gone on already.
    """
    waiting = [s for s in standings if s.paused]
    for rung in sorted({len(s.metrics) - 1 for s in waiting}, reverse=True):
        for bracket in sorted({s.bracket for s in waiting}):
            there = [s for s in standings if s.bracket == bracket and len(s.metrics) > rung]
            there.sort(key=lambda s: (-s.metrics[rung], s.number))
            best = there[: len(there) // ETA]
            gone = any(len(s.metrics) - 1 > rung or not (s.paused or s.pruned) for s in there)
            if last and not best and not gone:
                best = there[:1]
            for standing in best:
                if standing.paused and len(standing.metrics) - 1 == rung:
                    return standing.number
    return None
