"""Small image files for the tests of the image task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def image_tree(folder: Path, counts: dict[str, int], classes: int = 6, size: int = 32) -> Path:
    """Write class folders of colored PNG files below one folder per split (`.` for none).

    Args:
        folder: folder to write to.
        counts: images of each class, by split.
        classes: number of classes.
        size: shorter side in pixels.

    Returns:
        `folder`.
    """
    draw = np.random.RandomState(0)
    for split, count in counts.items():
        for label in range(classes):
            place = folder / split / f"class {label}"
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                color = draw.randint(0, 128, (1, 1, 3)) + 120 * label // classes
                noise = draw.randint(0, 8, (size, size + 8, 3))
                pixels = (color + noise).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number:03}.png")
    return folder
