"""The moving average of the weights: its formula, its start and its uses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train_tasks import CPU, Regression, digits_spec, interrupted, mlp_spec

from nipq_search.quant import QuantConfig
from nipq_search.train import FloatConfig, Hooks, Trainer, TrainSpec, train
from nipq_search.train.checkpoint import from_bytes, load_checkpoint
from nipq_search.train.models import load_trained
from nipq_search.train.stability.average import Average


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def disturbed(model):
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.randn_like(value) if value.is_floating_point() else 3)


def floats(state):
    return {k: v.clone() for k, v in state.items() if torch.is_tensor(v) and v.is_floating_point()}


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9])
def test_the_average_follows_its_formula(decay):
    model = network()
    average, expected = Average(model, decay), floats(model.state_dict())
    assert expected.keys() == average.values.keys()
    for n in range(8):
        disturbed(model)
        average.update(model)
        kept = min(decay, (1 + n) / (10 + n))
        now = floats(model.state_dict())
        expected = {name: kept * expected[name] + (1 - kept) * now[name] for name in expected}
    assert all(torch.allclose(average.values[k], v, atol=1e-6) for k, v in expected.items())


def test_swapping_twice_restores_everything():
    model = network()
    average = Average(model, 0.5)
    disturbed(model)
    average.update(model)
    kept, own = floats(average.values), {k: v.clone() for k, v in model.state_dict().items()}
    parameters = list(model.parameters())
    with pytest.raises(KeyError), average.applied(model):
        within = model.state_dict()
        assert all(torch.equal(within[name], value) for name, value in kept.items())
        assert int(within["1.num_batches_tracked"]) == int(own["1.num_batches_tracked"])
        raise KeyError
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())
    assert all(torch.equal(average.values[name], value) for name, value in kept.items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    average.copy_to(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())


def test_tied_weights_stay_tied_and_unstored_buffers_stay_out():
    model = nn.Module()
    model.one, model.other = nn.Linear(2, 2), nn.Linear(2, 2)
    model.other.weight = model.one.weight
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    average = Average(model, 0.5)
    assert set(average.values) == {"one.weight", "one.bias", "other.bias"}
    with average.applied(model):
        assert model.other.weight is model.one.weight


def test_a_state_of_another_model_is_refused():
    state = Average(network(), 0.5).state_dict()
    with pytest.raises(RuntimeError, match="different model"):
        Average(nn.Linear(2, 2), 0.5).load_state_dict(state)


def watched(monkeypatch):
    """Record the phase, the weights, their average and the number of updates after every step."""
    seen = []
    run = Trainer._train_step

    def spied(self, group):
        run(self, group)
        phase, average = self.schedule.phase(self.step - 1), self.average
        values = None if average is None else floats(average.values)
        updates = 0 if average is None else average.updates
        seen.append((phase, floats(self.model.state_dict()), values, updates))

    monkeypatch.setattr(Trainer, "_train_step", spied)
    return seen


def test_averaging_begins_with_the_tuning_phase(tmp_path, monkeypatch):
    seen = watched(monkeypatch)
    train(Regression(), mlp_spec(ema=0.9, noise_share=0.5), tmp_path, CPU)
    assert [updates for *_, updates in seen] == [0] * 9 + list(range(1, 10))
    assert all(values is None for phase, _, values, _ in seen if phase == "noise")
    last_of_noise, (_, first, average, _) = seen[8][1], seen[9]
    for name in average.keys() & last_of_noise.keys():
        # The average starts at the weights of the freeze; its first update keeps a tenth of them.
        expected = 0.1 * last_of_noise[name] + 0.9 * first[name]
        assert torch.allclose(average[name], expected, atol=1e-6), name


def test_averaging_of_a_float_model_begins_immediately(tmp_path, monkeypatch):
    seen = watched(monkeypatch)
    config = FloatConfig(ema=0.9, epochs=2, batch_size=32, lr=0.01)
    train(Regression(), TrainSpec(train=config.as_training(), seed=1), tmp_path, CPU)
    assert [updates for *_, updates in seen] == list(range(1, 13))


@pytest.mark.parametrize("kind", ["float", "nipq", "lsq"])
def test_the_average_is_validated_and_stored(kind, digits, tmp_path, monkeypatch):
    seen, curve, tested = watched(monkeypatch), [], []
    if kind == "float":
        config = FloatConfig(ema=0.8, epochs=2)
        spec = TrainSpec(train=config.as_training(), seed=1)
    else:
        quant = QuantConfig(quantizer=kind, start_bits=4)
        budget = {"bops": 1.2e6} if kind == "nipq" else None
        spec = digits_spec(None, ema=0.8, epochs=2, quant=quant, budget=budget)
    evaluate = digits.evaluate

    def watched_evaluate(model, split):
        tested.append(floats(model.state_dict()))
        return evaluate(model, split)

    monkeypatch.setattr(digits, "evaluate", watched_evaluate)
    result = train(digits, spec, tmp_path, CPU, Hooks(on_epoch=curve.append))
    _, own, average, _ = seen[-1]
    assert any(not torch.equal(average[name], own[name]) for name in average)
    stored = floats(from_bytes((tmp_path / "model.pt").read_bytes())["model"])
    for name, value in average.items():
        assert torch.equal(tested[-2][name], value), "validated for the last point of the curve"
        if kind == "float" or "running" not in name:  # these were re-estimated
            assert torch.equal(tested[-1][name], value) and torch.equal(stored[name], value)
    if kind != "float":
        assert any(
            "running" in name and not torch.equal(stored[name], average[name]) for name in average
        )
    model = load_trained(digits, spec, tmp_path / "model.pt", CPU)
    assert evaluate(model, "validation") == result.metrics


def test_without_a_tuning_phase_there_is_no_average(tmp_path):
    shas = {
        train(
            Regression(), mlp_spec(ema=ema, noise_share=1.0), tmp_path / str(ema), CPU
        ).model_sha256
        for ema in (0.0, 0.9)
    }
    assert len(shas) == 1


def test_only_checkpoints_of_the_tuning_phase_contain_the_average(tmp_path):
    spec = mlp_spec(ema=0.9)
    for steps, updates in ((9, None), (1, 1), (4, 5)):
        interrupted(Regression(), spec, tmp_path, steps)
        state = load_checkpoint(tmp_path / "checkpoints").get("average")
        assert (state and state["updates"]) == updates
