"""Arguments with which the conformance tests build a task: tiny data of its own, if it needs any.

A task that needs arguments has a function here; it writes its files into the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def image_tree(folder: Path, counts: dict[str, int], classes: int = 6, size: int = 32) -> Path:
    """Class folders of coloured PNG files below a folder for each split (`.` for none).

    Args:
        folder: where to write.
        counts: images of each class, by split.
        classes: how many.
        size: pixels of the shorter side.
    """
    from PIL import Image

    draw = np.random.RandomState(0)
    for split, count in counts.items():
        for label in range(classes):
            place = folder / split / f"class {label}"
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                colour = draw.randint(0, 128, (1, 1, 3)) + 20 * label
                noise = draw.randint(0, 8, (size, size + 8, 3))
                pixels = (colour + noise).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number:03}.png")
    return folder


def image_folder(folder: Path) -> dict[str, Any]:
    """A tree without splits, and a small model of timm's."""
    tree = folder / "images"
    if not tree.exists():
        image_tree(tree, {".": 20})
    return {"path": str(tree), "model": "test_efficientnet", "size": 32, "augment": "imagenet"}


ARGUMENTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "image_folder": image_folder,
}
"""By the name of the task in the registry; a task without an entry is built without arguments."""


def sample_arguments(name: str, folder: Path) -> dict[str, Any]:
    """`task_args` of a small instance of a task; calls with the same folder give the same."""
    return ARGUMENTS[name](folder) if name in ARGUMENTS else {}
