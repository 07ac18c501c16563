"""Conformance suite for samplers."""

from __future__ import annotations

from typing import Any, ClassVar

import optuna
import pytest

from nipq_search.search.config.space import distribution
from nipq_search.search.strategies.samplers import SamplerFactory, random
from nipq_search.search.study.proposals import suggest

SPACE: dict[str, dict[str, list[Any]]] = {
    "lr": {"log": [0.01, 0.1]},
    "noise_share": {"uniform": [0.1, 0.6]},
    "lambda": {"int": [1, 50]},
    "distill_weight": {"choice": [0, 0.5, 1]},
}


def study_of(sampler: optuna.samplers.BaseSampler | None) -> optuna.Study:
    """Return an empty study in memory that maximizes the metric and minimizes the cost."""
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)


def ask(study: optuna.Study) -> tuple[optuna.trial.Trial, dict[str, Any]]:
    """Ask `study` for a new trial; return the trial and its hyperparameters by name."""
    trial = study.ask()
    values = {key: suggest(trial, key, distribution(key, form)) for key, form in SPACE.items()}
    return trial, values


class SamplerConformance:
    """Properties of every sampler.

    Attributes:
        sampler: the factory under test.
    """

    sampler: ClassVar[SamplerFactory]

    def propose(self, seed: int, history: int) -> dict[str, Any]:
        """Return the hyperparameters that the sampler proposes after `history` finished trials.

        Args:
            seed: seed of the sampler.
            history: number of finished trials, whose hyperparameters do not depend on `seed`.
        """
        study = study_of(random(0))
        for index in range(history):
            trial, values = ask(study)
            study.tell(trial, [values["lr"], float(index)])
        study.sampler = self.sampler(seed)
        return ask(study)[1]

    @pytest.mark.parametrize("history", [0, 12])
    def test_samplers_propose_reproducibly_within_the_space(self, history: int) -> None:
        """Proposals are in the space, equal for equal seeds and different for different seeds."""
        proposals = [self.propose(seed, history) for seed in (3, 3, 4)]
        assert proposals[0] == proposals[1] != proposals[2]
        for proposal in proposals:
            for key, form in SPACE.items():
                allowed = distribution(key, form)
                # Optuna has no public method that checks whether a distribution contains a value.
                assert allowed._contains(allowed.to_internal_repr(proposal[key]))

    def test_samplers_handle_failed_trials(self) -> None:
        """A search with failed trials never proposes the same learning rate twice."""
        study = study_of(None)
        for number in range(14):
            study.sampler = self.sampler(number)
            trial, values = ask(study)
            if number % 4 == 3:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, [values["lr"], values["noise_share"]])
        assert len({trial.params["lr"] for trial in study.trials}) == 14
