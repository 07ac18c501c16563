"""Complete training runs: their phases, hooks, sample counts and results."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from train_tasks import CPU, Regression, SpiedDigits, digits_spec, mlp_spec, outcome

from nipq_search.cost import cost_estimate, exact_cost
from nipq_search.cost.projection import MIN_USAGE
from nipq_search.errors import UserError
from nipq_search.quant import quantizers
from nipq_search.quant.insertion.prepare import is_frozen, quant_state
from nipq_search.train import Hooks, NonFiniteLoss, Trainer, TrainSpec, train
from nipq_search.train.checkpoint import from_bytes
from nipq_search.train.forward import SharedForward
from nipq_search.train.loop import steps_in
from nipq_search.train.models import load_float, load_trained, prepare_for


def trained(task, spec, folder):
    """Train, and return the trained model and its result."""
    result = train(task, spec, folder, CPU)
    return load_trained(task, spec, folder / "model.pt", CPU), result


def test_a_step_with_distillation_runs_the_model_once(digits, float_model, tmp_path, monkeypatch):
    calls, clocks = [], []
    run, original = Trainer._train_step, SharedForward.__call__

    def counted_step(self, batch):
        handle = self.model.register_forward_hook(lambda *_: calls.append(self.step))
        before = quant_state(self.model).clock.step
        run(self, batch)
        handle.remove()
        clocks.append(quant_state(self.model).clock.step - before)

    asked = []
    monkeypatch.setattr(Trainer, "_train_step", counted_step)
    monkeypatch.setattr(
        SharedForward, "__call__", lambda self, *a, **k: asked.append(1) or original(self, *a, **k)
    )
    spec = digits_spec(float_model, epochs=0.5)
    train(digits, spec, tmp_path, CPU)
    assert calls == [0, 1, 2, 3]
    assert clocks == [1, 1, 1, 1]
    assert len(asked) == 8, "both losses call the model"


def test_shared_forward_runs_again_on_other_inputs():
    model = nn.Linear(2, 2)
    shared = SharedForward(model)
    x, y = torch.zeros(1, 2), torch.zeros(1, 2)
    assert shared(x) is shared(x)
    assert shared(x) is not shared(y)
    assert shared(input=x) is shared(input=x)
    assert shared(x) is not shared(input=x)
    assert shared.in_features == 2


@pytest.mark.parametrize("distill", [True, False])
def test_budget_is_kept_and_used_up(distill, digits, float_model, tmp_path):
    spec = digits_spec(float_model, distill=distill, epochs=1, start="config")
    model, result = trained(digits, spec, tmp_path)
    graph, target = quant_state(model).graph, spec.budget["bops"]
    bits = {name: q.bits.hard() for name, q in quantizers(model).items()}
    assert exact_cost("bops", graph, bits) == result.cost["bops"] <= target
    fits = [
        (name, width)
        for name, quantizer in quantizers(model).items()
        for width in quantizer.bits.allowed
        if width > bits[name] and exact_cost("bops", graph, {**bits, name: width}) <= target
    ]
    assert result.cost["bops"] >= MIN_USAGE * target or not fits
    assert is_frozen(model)


def test_several_targets_hold_together(tmp_path):
    spec = dataclasses.replace(mlp_spec(), budget={"bops": 6000, "weight_bytes": 300})
    _, result = trained(Regression(), spec, tmp_path)
    assert result.cost["bops"] <= 6000 and result.cost["weight_bytes"] <= 300


def test_bits_move_in_the_noise_phase_only(digits, float_model, tmp_path, monkeypatch):
    seen = []
    run = Trainer._train_step

    def spied(self, batch):
        run(self, batch)
        found = quantizers(self.model).values()
        seen.append((self.schedule.phase(self.step - 1), [q.bits.soft().item() for q in found]))

    monkeypatch.setattr(Trainer, "_train_step", spied)
    train(digits, digits_spec(float_model), tmp_path, CPU)
    noise = [bits for phase, bits in seen if phase == "noise"]
    tuning = [bits for phase, bits in seen if phase == "tuning"]
    assert (len(noise), len(tuning)) == (14, 13)
    assert noise[0] != noise[-1]
    assert all(bits == tuning[0] for bits in tuning)
    assert all(width.is_integer() for width in tuning[0])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_tuning_and_all_noise(share, tmp_path):
    curve = []
    spec = mlp_spec(noise_share=share)
    result = train(Regression(), spec, tmp_path, CPU, Hooks(on_epoch=curve.append))
    assert {point.phase for point in curve} == {"noise" if share else "tuning"}
    assert result.cost["bops"] <= 6000
    assert is_frozen(load_trained(Regression(), spec, tmp_path / "model.pt", CPU))


def test_distillation_changes_the_outcome_and_needs_its_method(digits, float_model, tmp_path):
    results = [
        train(digits, digits_spec(float_model, epochs=1, **options), tmp_path / str(index), CPU)
        for index, options in enumerate(
            [{}, {"distill": False}, {"distill_weight": 0.0}, {"distill_weight": 1.0}]
        )
    ]
    shas = [result.model_sha256 for result in results]
    assert shas[1] == shas[2], "a weight of zero equals no distillation"
    assert len(set(shas)) == 3
    with pytest.raises(UserError, match=r"no distill_loss.*train.distill"):
        train(Regression(), mlp_spec(distill=True), tmp_path / "mlp", CPU)


def test_samples_are_counted_exactly(digits, float_model, tmp_path):
    reported = []
    hooks = Hooks(on_samples=reported.append)
    spec = digits_spec(float_model, epochs=1.3)
    result = train(digits, spec, tmp_path, CPU, hooks)
    # If training ends within an epoch, the loader yields one more batch than is trained on.
    used = 128 + 1097 + 3 * 128 + 2 * 128
    assert result.samples == sum(reported) == used
    assert digits.given == used
    assert result.steps == 12


def test_samples_of_a_failing_training_are_reported(tmp_path):
    task, reported = Regression(), []

    def poison(point):
        task.poison = True

    spec = mlp_spec(epochs=4)
    with pytest.raises(NonFiniteLoss):
        train(task, spec, tmp_path, CPU, Hooks(on_epoch=poison, on_samples=reported.append))
    assert sum(reported) == task.given


def test_a_loss_that_is_not_finite(tmp_path):
    task, spec = Regression(), mlp_spec()

    def poison(point):
        task.poison = True

    message = r"loss became nan by step 1[0-2] \(tuning phase\).*lower lr"
    with pytest.raises(NonFiniteLoss, match=message):
        train(task, spec, tmp_path, CPU, Hooks(on_epoch=poison))


def test_the_global_generator_is_left_alone(digits, float_model, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(digits, digits_spec(float_model, epochs=0.3), tmp_path, CPU)
    assert torch.equal(before, torch.get_rng_state())
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(train(Regression(), mlp_spec(), tmp_path / str(seed), CPU))
    assert outcome(results[0]) == outcome(results[1])


def test_the_test_split_is_never_read(digits, float_model, tmp_path, monkeypatch):
    evaluated = []
    evaluate = digits.evaluate
    monkeypatch.setattr(
        digits, "evaluate", lambda model, split: evaluated.append(split) or evaluate(model, split)
    )
    train(digits, digits_spec(float_model, epochs=1), tmp_path, CPU)
    assert set(evaluated) == {"validation"}
    assert digits.splits_read == {"train", "validation"}


def test_a_users_own_task(tmp_path):
    task, curve = Regression(), []
    model, result = trained(task, mlp_spec(epochs=8), tmp_path)
    train(task, mlp_spec(epochs=8), tmp_path / "again", CPU, Hooks(on_epoch=curve.append))
    assert result.metrics == task.evaluate(model, "validation")
    assert is_frozen(model)
    assert curve[-1].metrics["train_loss"] < curve[0].metrics["train_loss"]
    assert {"train_loss", "validation_mse", "lr", "bops_estimate"} <= curve[0].metrics.keys()
    assert set(from_bytes((tmp_path / "model.pt").read_bytes())) == {"model"}


def test_epochs_of_a_loader_without_a_length_are_counted():
    task = Regression(lengths=(5,))
    assert not hasattr(task.loader("train", 4), "__len__")
    assert steps_in(task.loader("train", 4)) == 5
    assert steps_in(range(7)) == 7


@pytest.mark.parametrize("lengths", [(6, 6, 6, 5), (6, 6, 6, 7)])
def test_epochs_must_have_equal_length(lengths, tmp_path):
    task = Regression(lengths=lengths)  # calibration and counting use two passes
    count = lengths[-1]
    with pytest.raises(RuntimeError, match=rf"yielded {count} batches in epoch 1 but 6 before"):
        train(task, mlp_spec(), tmp_path, CPU)


def test_an_empty_split_is_named(tmp_path):
    spec = dataclasses.replace(mlp_spec(), quant=None, budget=None)
    with pytest.raises(UserError, match=r"loader\('train'\) yields no batches"):
        train(Regression(lengths=(0,)), spec, tmp_path, CPU)


@pytest.mark.parametrize("content", [None, b"", b"no weights", "shapes", "tensor", "names"])
def test_mismatched_float_files_are_rejected(content, tmp_path):
    path = tmp_path / "float.pt"
    if content == "tensor":
        torch.save(torch.zeros(3), path)
    elif content == "shapes":
        torch.save(nn.Sequential(*[nn.Linear(4, 3), nn.ReLU()] * 2).state_dict(), path)
    elif content == "names":
        torch.save({"model": {"stem": torch.zeros(1)}}, path)
    elif content is not None:
        path.write_bytes(content)
    spec = dataclasses.replace(mlp_spec(), float_model=path)
    with pytest.raises(UserError, match=r"float model .*float\.pt: ") as caught:
        train(Regression(), spec, tmp_path / "out", CPU)
    assert "\n" not in str(caught.value)


def test_a_float_file_without_quantization_is_stored_as_it_is(float_model, digits, tmp_path):
    spec = TrainSpec(train=digits_spec(None).train, seed=1, float_model=float_model)
    result = train(digits, spec, tmp_path, CPU)
    assert (result.samples, result.steps, result.bits, result.cost) == (0, 0, {}, {})
    stored = load_float(digits, tmp_path / "model.pt", 1, CPU).state_dict()
    original = load_float(digits, float_model, 1, CPU).state_dict()
    assert all(torch.equal(stored[key], value) for key, value in original.items())


def test_learning_starts_at_the_budget(float_model, digits):
    spec = digits_spec(float_model)
    model = load_float(digits, float_model, 1, CPU)
    prepared, samples = prepare_for(digits, model, spec, CPU)
    estimate = cost_estimate("bops", prepared).item()
    assert len({round(q.bits.soft().item(), 3) for q in quantizers(prepared).values()}) == 1
    assert estimate == pytest.approx(spec.budget["bops"], rel=0.01)
    assert samples == 128


def test_a_float_model_that_lacks_entries_is_refused(tmp_path):
    task = SpiedDigits()
    state = task.build_model().state_dict()
    state.pop("head.bias")
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"1 entries are missing, such as head\.bias; give"):
        load_float(task, tmp_path / "part.pt", 0, CPU)
