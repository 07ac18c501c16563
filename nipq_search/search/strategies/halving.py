"""Asynchronous successive halving within each budget, as a pure function of rung metrics.

Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning" (arXiv 1810.05934). A
trial pauses at each rung and is promoted as soon as it is among the best of the trials that have
reached the rung. Trials with different budgets are never compared, because the cheaper ones would
always lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ETA = 3
"""Reduction factor: one in every `ETA` trials at a rung is promoted."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A trial and its metrics at the rungs that it has reached.

    Attributes:
        number: trial number.
        bracket: index of the trial's budget; only trials in the same bracket compete.
        metrics: the metric at each rung so far; greater is better.
        paused: whether the trial is paused at the last of these rungs, awaiting a decision.
        pruned: whether the trial was stopped there for good.
    """

    number: int
    bracket: int
    metrics: Sequence[float]
    paused: bool
    pruned: bool = False


def to_promote(standings: Sequence[Standing], last: bool) -> int | None:
    """Return the number of the paused trial to promote, preferring higher rungs, or None.

    Args:
        standings: every trial that has reached a rung, including pruned and finished ones.
        last: whether no further trial will start. In that case, the best trial at a rung is
            promoted even if fewer than `ETA` trials have reached the rung, unless another trial
            in its bracket has already been promoted from that rung.
    """
    waiting = [s for s in standings if s.paused]
    for rung in sorted({len(s.metrics) - 1 for s in waiting}, reverse=True):
        for bracket in sorted({s.bracket for s in waiting}):
            rivals = [s for s in standings if s.bracket == bracket and len(s.metrics) > rung]
            rivals.sort(key=lambda s: (-s.metrics[rung], s.number))
            best = rivals[: len(rivals) // ETA]
            any_promoted = any(
                len(s.metrics) - 1 > rung or not (s.paused or s.pruned) for s in rivals
            )
            if last and not best and not any_promoted:
                best = rivals[:1]
            for standing in best:
                if standing.paused and len(standing.metrics) - 1 == rung:
                    return standing.number
    return None
