"""Pauses after a fraction of the steps: evaluation of a projected copy, and resuming."""

from __future__ import annotations

import dataclasses

import pytest
from train_tasks import CPU, digits_spec, interrupted, outcome

from nipq_search.train import Hooks, Paused, train
from nipq_search.train.checkpoint import load_checkpoint


def pause_at(digits, spec, share, folder, **hooks):
    with pytest.raises(Paused) as caught:
        train(digits, dataclasses.replace(spec, pause=share), folder, CPU, Hooks(**hooks))
    return dict(caught.value.metrics)


@pytest.mark.parametrize("changes", [{}, {"noise_share": 0.2, "ema": 0.9}])
def test_a_paused_training_ends_bit_identically(float_model, digits, tmp_path, changes):
    spec = digits_spec(float_model, **changes)
    whole = train(digits, spec, tmp_path / "whole", CPU)
    for share in (0.2, 0.6):
        metrics = pause_at(digits, spec, share, tmp_path / "rungs")
        assert 0 <= metrics["accuracy"] <= 1
    assert outcome(train(digits, spec, tmp_path / "rungs", CPU)) == outcome(whole)


def test_an_interrupted_pause_measures_the_same(float_model, digits, tmp_path):
    spec = digits_spec(float_model)
    expected = pause_at(digits, spec, 0.4, tmp_path / "whole")
    total = load_checkpoint(tmp_path / "whole" / "checkpoints")["step"]
    interrupted(digits, spec, tmp_path / "cut", total - 1)
    assert pause_at(digits, spec, 0.4, tmp_path / "cut") == expected
    # The state is saved before the evaluation, so a crash in it repeats no training.
    assert pause_at(digits, spec, 0.4, tmp_path / "cut") == expected
    assert load_checkpoint(tmp_path / "cut" / "checkpoints")["step"] == total


def test_rungs_evaluate_on_budget_and_count_samples(float_model, digits, tmp_path, monkeypatch):
    from nipq_search.cost.projection import usage
    from nipq_search.quant.insertion.prepare import quant_state, quantizers
    from nipq_search.train import trial

    seen, counted = [], []
    evaluate = trial.evaluate

    def spy(task, model, split):
        seen.append(model)
        return evaluate(task, model, split)

    monkeypatch.setattr(trial, "evaluate", spy)
    spec = digits_spec(float_model, norm_batches=2)
    pause_at(digits, spec, 0.2, tmp_path, on_samples=counted.append)
    (model,) = seen
    bits = {n: q.bits for n, q in quantizers(model).items()}
    assert all(width.is_frozen for width in bits.values())
    graph = quant_state(model).graph
    hard = {name: width.hard() for name, width in bits.items()}
    assert usage(graph, hard, trial.Budget(**spec.budget)) <= 1
    state = load_checkpoint(tmp_path / "checkpoints")
    assert sum(counted) == state["samples"] + 2 * spec.train.batch_size


def test_bits_are_recorded_during_the_noise_phase(float_model, digits, tmp_path):
    spec = digits_spec(float_model, noise_share=0.5)
    result = train(digits, spec, tmp_path / "whole", CPU)
    notes = result.history
    assert notes[0]["step"] == 0 and len(notes) > 3
    steps = [note["step"] for note in notes]
    assert steps == sorted(set(steps))
    assert steps[-1] == round(0.5 * result.steps), "the end of the noise phase"
    assert all(note["bits"].keys() == note["gradient"].keys() for note in notes)
    assert any(value != 0 for value in notes[-1]["gradient"].values())
    pause_at(digits, spec, 0.2, tmp_path / "rungs")
    assert train(digits, spec, tmp_path / "rungs", CPU).history == notes, "resumed"


def test_without_a_noise_phase_nothing_is_recorded(float_model, digits, tmp_path):
    result = train(digits, digits_spec(float_model, noise_share=0.0), tmp_path, CPU)
    assert result.history == ()
