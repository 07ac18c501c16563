"""Incremental reading of a study, whose list of trials only grows."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState


def is_foreign(trial: FrozenTrial) -> bool:
    """Return whether a user added a trial to the study as COMPLETE, so that it has no model.

    Trials that ran as jobs have the attribute `strategy`, which is set before the job starts.
    """
    return trial.state is TrialState.COMPLETE and "strategy" not in trial.user_attrs


class UnseenTrials:
    """Selects the trials to process: each finished trial once, unfinished trials every time.

    A finished trial never changes, so callers can keep what they derived from it. If they derived
    it again, the work per new trial would grow with the number of trials.
    """

    def __init__(self) -> None:
        """Start with all trials unseen."""
        self._seen: set[int] = set()
        self._all_seen_below = 0

    def take(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the trials that no earlier call returned as finished, ordered by number.

        Args:
            trials: all trials of the study, ordered by number.
        """
        while (
            self._all_seen_below < len(trials)
            and trials[self._all_seen_below].number in self._seen
        ):
            self._all_seen_below += 1
        found = [t for t in trials[self._all_seen_below :] if t.number not in self._seen]
        self._seen.update(t.number for t in found if t.state.is_finished())
        return found
