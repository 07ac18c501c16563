"""The optimizer's parameter groups and state in each phase."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from train_tasks import CPU, Regression, interrupted, mlp_spec

from nipq_search.quant import QuantConfig, prepare, quantizers
from nipq_search.train import FloatConfig, TrainConfig, Trainer, TrainSpec, train
from nipq_search.train.checkpoint import load_checkpoint
from nipq_search.train.models import load_trained
from nipq_search.train.optimizer import drop_group, make_optimizer


def groups(optimizer):
    return {group["name"]: group for group in optimizer.param_groups}


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)]
)
def test_groups_have_separate_rates_and_only_weights_decay(name, kind):
    task = Regression()
    model = prepare(task.build_model(), task.example_inputs(), QuantConfig())
    config = TrainConfig(optimizer=name, lr=0.01, lr_bits=4, lr_boundaries=2, weight_decay=0.3)
    optimizer = make_optimizer(model, config, quantized=True)
    assert type(optimizer) is kind
    found = {n: (g["base_lr"], g["weight_decay"]) for n, g in groups(optimizer).items()}
    assert found == {
        "decayed": (0.01, 0.3),
        "plain": (0.01, 0.0),
        "boundaries": (0.02, 0.0),
        "bits": (0.04, 0.0),
    }
    if name == "adamw":
        assert all(g["betas"] == (0.9, 0.999) and g["eps"] == 1e-8 for g in optimizer.param_groups)


def test_a_float_model_has_two_groups():
    config = FloatConfig(optimizer="adamw", lr=0.01, weight_decay=0.3).as_training()
    optimizer = make_optimizer(Regression().build_model(), config, quantized=False)
    assert type(optimizer) is torch.optim.AdamW
    found = {n: (g["base_lr"], g["weight_decay"]) for n, g in groups(optimizer).items()}
    assert found == {"decayed": (0.01, 0.3), "plain": (0.01, 0.0)}


def test_dropping_a_group_drops_its_state():
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(model, TrainConfig(optimizer="adamw"), quantized=False)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2
    drop_group(optimizer, "plain")
    drop_group(optimizer, "no such group")
    assert set(groups(optimizer)) == {"decayed"}
    assert list(optimizer.state) == [model.weight]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [[12], [4, 8], [9, 3], [10, 2]])
def test_the_bits_state_is_gone_after_the_freeze_and_after_a_resume(
    optimizer, steps, tmp_path, monkeypatch
):
    seen = []
    run = Trainer._train_step

    def spied(self, batch):
        run(self, batch)
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        assert all(any(p is q for q in held) for p in self.optimizer.state)
        seen.append((self.schedule.phase(self.step - 1), "bits" in groups(self.optimizer)))
        bits = [q.bits for q in quantizers(self.model).values()]
        assert all((b.theta is None) == (seen[-1][0] == "tuning") for b in bits if b.learned)

    monkeypatch.setattr(Trainer, "_train_step", spied)
    spec = mlp_spec(optimizer=optimizer, lr=0.01)
    for count in steps:
        interrupted(Regression(), spec, tmp_path, count)
    assert seen == [("noise", True)] * 9 + [("tuning", False)] * 3
    state = load_checkpoint(tmp_path / "checkpoints")
    names = [group["name"] for group in state["optimizer"]["param_groups"]]
    assert names == ["decayed", "plain", "boundaries"]
    held = {index for group in state["optimizer"]["param_groups"] for index in group["params"]}
    assert set(state["optimizer"]["state"]) == held


def test_adamw_trains_and_ignores_momentum(tmp_path):
    results = [
        train(Regression(), mlp_spec(optimizer=name, momentum=m, lr=0.01), tmp_path / str(i), CPU)
        for i, (name, m) in enumerate([("adamw", 0.9), ("adamw", 0.5), ("sgd", 0.9)])
    ]
    assert results[0].model_sha256 == results[1].model_sha256 != results[2].model_sha256
    assert results[0].cost["bops"] <= 6000


def test_the_float_gradient_is_clipped(tmp_path):
    """At a learning rate of 1, a step moves the weights by at most the clipped norm of 1e-3."""
    config = FloatConfig(lr=1.0, momentum=0.0, weight_decay=0.0, warmup=0.0, epochs=1e-9)
    moved = {}
    for clip in (0.0, 1e-3):
        training = dataclasses.replace(config, grad_clip=clip).as_training()
        spec = TrainSpec(train=training, seed=1)
        train(Regression(), spec, tmp_path / str(clip), CPU)
        model = load_trained(Regression(), spec, tmp_path / str(clip) / "model.pt", CPU)
        torch.manual_seed(1)
        before = Regression().build_model()
        change = [a - b for a, b in zip(model.parameters(), before.parameters(), strict=True)]
        moved[clip] = torch.cat([c.flatten() for c in change]).norm().item()
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moved[0.0] > 0.01
