"""What is new among the trials of a study, which only ever grows."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState


def is_foreign(trial: FrozenTrial) -> bool:
    """Whether somebody added a finished trial to the study: no job made it, it has no model.

    What a job makes has its strategy noted before it starts.
    """
    return trial.state is TrialState.COMPLETE and "strategy" not in trial.user_attrs


class News:
    """Tells finished trials once, and those that may still change each time.

    A finished trial never changes, so whoever keeps what it taught need not look at it again: with
    thousands of trials, each further one must not cost ever more.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._told: set[int] = set()
        self._all_told = 0

    def of(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Trials that have not been told as finished, by number.

        Args:
            trials: all of the study, by number.
        """
        while self._all_told < len(trials) and trials[self._all_told].number in self._told:
            self._all_told += 1
        found = [t for t in trials[self._all_told :] if t.number not in self._told]
        self._told.update(t.number for t in found if t.state.is_finished())
        return found
