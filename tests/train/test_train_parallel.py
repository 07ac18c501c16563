"""Data-parallel training by two processes, compared with a single process."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from train_tasks import CPU, digits_spec, mlp_spec, stop_after

from nipq_search.errors import UserError
from nipq_search.quant import QuantConfig
from nipq_search.tasks.vision.digits import Digits
from nipq_search.train import Hooks, Interrupted, TrainConfig, TrainSpec, train
from nipq_search.train.checkpoint import from_bytes
from nipq_search.train.models import MODEL_FILE
from nipq_search.train.parallel import Team, joined
from nipq_search.train.spec import Released

PRELOADED = ["nipq_search.train", "sklearn.datasets", "torch._dynamo", "torch.distributed"]


class Precise(Digits):
    """Digits in float64 with batch normalization; the order of sums changes results by 1e-16."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self.load_data()

    def build_model(self) -> nn.Module:
        return super().build_model().double()

    def example_inputs(self) -> Any:
        return tuple(x.double() for x in super().example_inputs())

    def loss(self, model: Any, batch: Any) -> Any:
        return super().loss(model, (batch[0].double(), batch[1]))

    def distill_loss(self, model: Any, teacher: Any, batch: Any) -> Any:
        return super().distill_loss(model, teacher, (batch[0].double(), batch[1]))

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        (x, y), seen = next(iter(self.loader(split, 200))), model
        return {"accuracy": float((seen(x.double()).argmax(1) == y).double().mean())}


def member(rank: int, size: int, folder: str, task: Any, spec: TrainSpec, stop: int) -> None:
    """Run one process of a training run; the leader stores its result next to the model."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store-{stop}", size)
    hooks = stop_after(stop) if stop and rank == 0 else Hooks()
    with joined(store, rank, size) as team:
        try:
            result = train(task, spec, Path(folder), CPU, hooks, team)
            torch.save(vars(result), f"{folder}/result.pt")
        except (Released, Interrupted):
            pass
    # As in a sweep: a Gloo thread that releases a tensor while the interpreter shuts down would
    # abort the process.
    os._exit(0)


def together(folder: Path, task: Any, spec: TrainSpec, size: int = 2, stop: int = 0) -> Any:
    """Return the result of a training run by `size` processes; None if it was stopped."""
    folder.mkdir(exist_ok=True)
    # Fork from a process that has imported torch; `mp.spawn` would import it in every process.
    multiprocessing.set_forkserver_preload(PRELOADED)
    arguments = (size, str(folder), task, spec, stop)
    mp.start_processes(member, arguments, nprocs=size, start_method="forkserver")
    path = folder / "result.pt"
    return torch.load(path, weights_only=False) if path.exists() else None


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = from_bytes((folder / MODEL_FILE).read_bytes())["model"]
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}


def precise_spec(**changes: Any) -> TrainSpec:
    """Return a trial of 20 steps, slightly more than one epoch, that ends in the tuning phase."""
    options: dict[str, Any] = {"epochs": 20 / 9, "batch_size": 128, "lr": 0.05, "momentum": 0.9}
    options |= {"noise_share": 0.8, "norm_batches": 0, "calibration_batches": 1, "lr_bits": 20.0}
    return TrainSpec(
        train=TrainConfig(**options | changes),
        seed=7,
        quant=QuantConfig(),
        budget={"bops": 1.2e6},
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 2, "grad_clip": 1.0, "epochs": 4.0},
        {"batch_size": 99, "tuning": "noise"},
    ],
    ids=["plain", "accumulated", "unequal shares"],
)
def test_two_processes_follow_one(tmp_path, changes):
    """Compare weights, boundaries, bits and running statistics within 1e-9, in float64."""
    task, spec = Precise(), precise_spec(**changes)
    alone = train(task, spec, tmp_path / "alone", CPU)
    two = together(tmp_path / "two", task, spec)
    assert two["bits"] == alone.bits and two["steps"] == alone.steps
    assert two["samples"] == alone.samples, "each sample counts once"
    one, other = weights(tmp_path / "alone"), weights(tmp_path / "two")
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-9, msg=name)
    for ours, theirs in zip(two["history"], alone.history, strict=True):
        assert ours["step"] == theirs["step"]
        for key in ("bits", "gradient"):
            for name, figure in theirs[key].items():
                assert ours[key][name] == pytest.approx(figure, abs=1e-9), (key, name)


def test_a_float_model_trains_together_too(tmp_path):
    task = Precise()
    config = TrainConfig(epochs=2, batch_size=128, lr=0.05, distill=False, noise_share=0)
    spec = TrainSpec(train=config, seed=1)
    train(task, spec, tmp_path / "alone", CPU)
    together(tmp_path / "two", task, spec)
    one, other = weights(tmp_path / "alone"), weights(tmp_path / "two")
    assert all((one[name] - other[name]).abs().max() < 1e-9 for name in one)


def test_stopping_and_resuming_is_bit_identical(tmp_path):
    task, spec = Precise(), precise_spec()
    whole = together(tmp_path / "whole", task, spec)
    assert together(tmp_path / "halves", task, spec, stop=5) is None
    resumed = together(tmp_path / "halves", task, spec)
    assert resumed == whole


def test_three_processes_learn_in_float32(tmp_path):
    """Some batches cannot be divided evenly, and the last batch of an epoch is smaller."""
    task = Digits(width=4)
    task.load_data()
    found = together(tmp_path / "three", task, digits_spec(None), size=3)
    alone = train(task, digits_spec(None), tmp_path / "alone", CPU)
    assert found["samples"] == alone.samples
    assert found["metrics"]["accuracy"] == pytest.approx(alone.metrics["accuracy"], abs=0.1)


def test_shares_partition_the_batch():
    for samples in (2, 3, 7, 256):
        parts = [list(range(samples))[Team(rank, 3).share(samples)] for rank in range(3)]
        if samples < 3:
            assert parts == [list(range(samples))] * 3
        else:
            assert sum(parts, []) == list(range(samples))


class Counts:
    """A task whose number of samples is not the number of rows."""

    def num_samples(self, batch: Any) -> int:
        return 5


class Opaque:
    """A batch of a type that only its task supports."""


def test_batches_that_cannot_be_sliced_are_reported():
    team, model = Team(0, 2), nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"take\(batch, part\)"):
        team.take_share(Counts(), model, Opaque())

    class Own:
        def take(self, batch: Any, part: slice) -> Any:
            return batch["x"][part], part

    with pytest.raises(UserError, match=r"take\(batch, part\)"):  # a list of images, five samples
        team.take_share(Counts(), model, {"images": [torch.zeros(3, 8, 8)] * 5})

    batch = {"x": torch.arange(10), "y": "label"}
    assert team.take_share(mlp_spec, model, batch)[0]["x"].tolist() == [0, 1, 2, 3, 4]
    assert team.take_share(mlp_spec, model, batch)[0]["y"] == "label"
    assert team.take_share(Own(), model, batch)[0][1] == slice(0, 5)
