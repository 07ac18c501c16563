"""Small image files that the tests of the image task share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def image_tree(folder: Path, counts: dict[str, int], classes: int = 6, size: int = 32) -> Path:
    """Class folders of coloured PNG files below a folder for each split (`.` for none).

    Args:
        folder: where to write.
        counts: images of each class, by split.
        classes: how many.
        size: pixels of the shorter side.
    """
    draw = np.random.RandomState(0)
    for split, count in counts.items():
        for label in range(classes):
            place = folder / split / f"class {label}"
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                colour = draw.randint(0, 128, (1, 1, 3)) + 120 * label // classes
                noise = draw.randint(0, 8, (size, size + 8, 3))
                pixels = (colour + noise).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number:03}.png")
    return folder
