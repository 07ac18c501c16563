"""Gradient accumulation: averages, and the boundaries of steps."""

from __future__ import annotations

import pytest
import torch
from train_tasks import CPU, Regression, digits_spec, interrupted, mlp_spec, outcome

from nipq_search.quant import quantizers
from nipq_search.train import FloatConfig, Hooks, Trainer, TrainSpec, train
from nipq_search.train.checkpoint import load_checkpoint
from nipq_search.train.models import load_trained


class Fixed(Regression):
    """Always yields the same 192 rows, in batches of the requested size."""

    weight = 1.0

    def loader(self, split, batch_size, seed=None):
        x = torch.rand(192, 4, generator=torch.Generator().manual_seed(5))
        return [{"x": part, "y": part.sum(1, keepdim=True)} for part in x.split(batch_size)]

    def loss(self, model, batch):
        return self.weight * super().loss(model, batch)


@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.05}, {"optimizer": "adamw"}])
def test_several_small_batches_step_as_one_large_one(options, tmp_path):
    weights = []
    for size, count in ((96, 1), (32, 3)):
        config = FloatConfig(batch_size=size, accumulate=count, lr=0.01, epochs=3, **options)
        spec = TrainSpec(train=config.as_training(), seed=1)
        result = train(Fixed(), spec, tmp_path / str(size), CPU)
        assert (result.steps, result.samples) == (6, 3 * 192)
        model = load_trained(Fixed(), spec, tmp_path / str(size) / "model.pt", CPU)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*weights, rtol=1e-4, atol=1e-6)


def test_the_penalty_counts_once_per_step(tmp_path, monkeypatch):
    """Without a task loss, only the budget penalty moves the bits."""
    seen = {}
    run = Trainer._train_step

    def spied(self, group):
        run(self, group)
        bits = [q.bits.soft().item() for q in quantizers(self.model).values()]
        seen.setdefault(len(group), []).append(bits)

    monkeypatch.setattr(Trainer, "_train_step", spied)
    monkeypatch.setattr(Fixed, "weight", 0.0)
    for size, count in ((96, 1), (32, 3)):
        spec = mlp_spec(batch_size=size, accumulate=count, start="config", noise_share=1.0)
        train(Fixed(), spec, tmp_path / str(size), CPU)
    assert len(seen[1]) == len(seen[3]) == 6
    assert seen[1][0] != seen[1][-1]
    assert torch.allclose(torch.tensor(seen[1]), torch.tensor(seen[3]), atol=1e-4)


def test_bit_width_derivatives_are_per_batch(tmp_path, monkeypatch):
    """The running mean is in loss per bit, regardless of the number of batches per step."""
    sums = []
    for count in (1, 6):
        spec = mlp_spec(accumulate=count, noise_share=1.0, lr=1e-9, epochs=1, start="config")
        train(Regression(), spec, tmp_path / str(count), CPU)
        model = load_trained(Regression(), spec, tmp_path / str(count) / "model.pt", CPU)
        sums.append(torch.cat([q.bits.marginal for q in quantizers(model).values()]))
    assert sums[0].abs().max() > 0
    assert torch.allclose(*sums, rtol=1e-3, atol=1e-7)


def test_the_last_step_of_an_epoch_takes_the_remaining_batches(tmp_path, monkeypatch):
    sizes, curve = [], []
    run = Trainer._train_step
    monkeypatch.setattr(
        Trainer, "_train_step", lambda self, group: sizes.append(len(group)) or run(self, group)
    )
    task, spec = Regression(lengths=(5,)), mlp_spec(accumulate=2, epochs=2, norm_batches=0)
    result = train(task, spec, tmp_path, CPU, Hooks(on_epoch=curve.append))
    assert sizes == [2, 2, 1, 2, 2, 1]
    assert [(point.epoch, point.step, point.phase) for point in curve] == [
        (1, 3, "noise"),
        (2, 6, "tuning"),
    ]
    assert result.steps == 6
    assert result.samples == (4 + 5 + 5) * 32, "calibration and two epochs"


def test_stops_and_checkpoints_happen_only_between_steps(digits, float_model, tmp_path):
    spec = digits_spec(float_model, accumulate=2)  # 5 steps per epoch, the last with one batch
    expected = train(digits, spec, tmp_path / "whole", CPU)
    for steps in (3, 1, 1, 5):
        interrupted(digits, spec, tmp_path / "cut", steps)
    state = load_checkpoint(tmp_path / "cut" / "checkpoints")
    assert (state["step"], state["samples"]) == (10, 128 + 2 * 1097)
    assert outcome(train(digits, spec, tmp_path / "cut", CPU)) == outcome(expected)


@pytest.mark.parametrize("lengths", [(6, 6, 6, 5), (6, 6, 6, 7)])
def test_accumulation_requires_epochs_of_equal_length(lengths, tmp_path):
    with pytest.raises(
        RuntimeError, match=rf"yielded {lengths[-1]} batches in epoch 1 but 6 before"
    ):
        train(Regression(lengths=lengths), mlp_spec(accumulate=4), tmp_path, CPU)
