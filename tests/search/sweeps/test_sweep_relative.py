"""Relative paths of a sweep file refer to the command's directory in every process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sweep_helpers import Command, states, write_sweep

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_workers_find_what_relative_paths_name(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    timm = pytest.importorskip("timm")
    import torch

    draw = np.random.RandomState(0)
    for number in range(24):
        folder = tmp_path / "images" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.randint(0, 256, (32, 32, 3)).astype(np.uint8)
        image.fromarray(pixels).save(folder / f"{number}.png")
    model = timm.create_model("test_resnet", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "start.pt")
    args = {"path": "images", "cache": "none", "model": "test_resnet", "size": 32}
    write_sweep(
        tmp_path,
        task="image_folder",
        task_args={**args, "weights": "start.pt"},
        float={"checkpoint": "start.pt"},
        train={"epochs": 1, "batch_size": 8, "lr": 0.01},
        search__trials=1,
    )
    command = Command(tmp_path)
    command.run()
    assert states(command.out) == ["COMPLETE"]
    command.no_orphans()
