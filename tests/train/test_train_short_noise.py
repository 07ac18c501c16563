"""Noise phases that are shorter than a strategy's minimum are omitted."""

from __future__ import annotations

import dataclasses

from train_tasks import CPU, digits_spec, interrupted, outcome

from nipq_search.train import Hooks, train


def trained(digits, float_model, folder, least):
    curve = []
    spec = dataclasses.replace(digits_spec(float_model), least_noise_steps=least)
    result = train(digits, spec, folder, CPU, Hooks(on_epoch=curve.append))
    return result, [point.phase for point in curve]


def test_only_a_noise_phase_that_is_too_short_is_omitted(float_model, digits, tmp_path):
    """The noise phase has 13 or 14 of the 27 steps."""
    whole, phases = trained(digits, float_model, tmp_path / "whole", 10)
    assert phases == ["noise", "tuning", "tuning"] and whole.history
    without, phases = trained(digits, float_model, tmp_path / "without", 15)
    assert phases == ["tuning"] * 3 and not without.history and without.steps == whole.steps
    none = train(digits, digits_spec(float_model, noise_share=0.0), tmp_path / "none", CPU)
    assert outcome(without) == outcome(none)


def test_an_interrupted_training_without_noise_ends_the_same(float_model, digits, tmp_path):
    spec = dataclasses.replace(digits_spec(float_model), least_noise_steps=15)
    whole = train(digits, spec, tmp_path / "whole", CPU)
    interrupted(digits, spec, tmp_path / "cut", 5)
    assert outcome(train(digits, spec, tmp_path / "cut", CPU)) == outcome(whole)
