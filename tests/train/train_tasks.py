"""Tasks and specifications shared by the tests of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nipq_search.quant import QuantConfig, WeightConfig
from nipq_search.tasks.vision.digits import Digits
from nipq_search.train import Hooks, Interrupted, TrainConfig, TrainResult, TrainSpec, train

CPU = torch.device("cpu")


class SpiedDigits(Digits):
    """Digits with a narrow network; counts the training samples that its loader yields."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self.load_data()
        self.given = 0
        self.splits_read: set[str] = set()

    def loader(self, split: str, batch_size: int, seed: int | None = None) -> Any:
        self.splits_read.add(split)
        return _Counted(self, super().loader(split, batch_size, seed), split)


class _Counted:
    def __init__(self, task: SpiedDigits, batches: Any, split: str) -> None:
        self.task, self.batches, self.split = task, batches, split

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.split == "train":
                self.task.given += len(batch[1])
            yield batch


class Regression:
    """A custom task: an MLP, batches that are dicts, and a metric to minimize."""

    metric = ("mse", "min")

    def __init__(self, lengths: tuple[int, ...] = (6,)) -> None:
        """Set the number of batches of each epoch in turn; the loader has no `__len__`."""
        self.lengths = lengths
        self.epochs = 0
        self.poison = False
        self.given = 0

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1)
        )

    def example_inputs(self) -> tuple[Tensor]:
        return (torch.zeros(1, 4),)

    def loader(self, split: str, batch_size: int, seed: int | None = None) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        length = self.lengths[min(self.epochs, len(self.lengths) - 1)]
        self.epochs += split == "train"
        for _ in range(length):
            x = torch.rand(batch_size, 4, generator=generator)
            yield {"x": x, "y": x.sum(1, keepdim=True)}

    def loss(self, model: Any, batch: Any) -> Tensor:
        self.given += len(batch["x"])
        loss = nn.functional.mse_loss(model(batch["x"]), batch["y"])
        return loss * float("nan") if self.poison else loss

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        batch = next(iter(self.loader(split, 64)))
        training = model.training
        model.eval()
        with torch.no_grad():
            error = nn.functional.mse_loss(model(batch["x"]), batch["y"])
        model.train(training)
        return {"mse": float(error)}


def digits_spec(float_model: Path | None, **changes: Any) -> TrainSpec:
    """Return a trial on digits: 27 steps, 9 per epoch; bits are frozen within the second epoch."""
    train = TrainConfig(
        **{"epochs": 3, "batch_size": 128, "lr": 0.05, "noise_share": 0.5, "norm_batches": 2}
        | {"calibration_batches": 1, "lr_bits": 20.0, "distill_weight": 0.5}
        | {k: v for k, v in changes.items() if k not in ("quant", "budget")}
    )
    return TrainSpec(
        train=train,
        seed=7,
        quant=changes.get("quant", QuantConfig()),
        budget=changes.get("budget", {"bops": 1.2e6}),
        float_model=float_model,
    )


def mlp_spec(**changes: Any) -> TrainSpec:
    """Return a trial on the regression task: 18 steps, 6 per epoch."""
    options = {"epochs": 3, "batch_size": 32, "distill": False, "noise_share": 0.5, "lr": 0.02}
    quant = QuantConfig(weights=WeightConfig(bits=(2, 4, 8)))
    return TrainSpec(
        train=TrainConfig(**options | changes), seed=3, quant=quant, budget={"bops": 6000}
    )


def stop_after(steps: int) -> Hooks:
    """Return hooks that request a stop after this number of steps."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= steps

    return Hooks(should_stop=should_stop)


def interrupted(task: Any, spec: TrainSpec, folder: Path, steps: int) -> None:
    """Train for this number of steps, then stop by request."""
    with contextlib.suppress(Interrupted):
        train(task, spec, folder, CPU, stop_after(steps))
        raise AssertionError("training ended before it was interrupted")


def outcome(result: TrainResult) -> dict[str, Any]:
    """Return everything that must be equal between a resumed and an uninterrupted run."""
    return vars(result)
