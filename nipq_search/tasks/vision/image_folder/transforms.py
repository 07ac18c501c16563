"""From a decoded image to the network's input: crop, augmentation, normalization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Ways to resize, and Pillow's number of each."""

AUGMENTATIONS = ("none", "light", "imagenet")
"""What may be done to training images."""

ATTEMPTS = 10
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """How an image becomes `size` by `size` pixels.

    Attributes:
        size: pixels of either side.
        share: the shorter side becomes `size / share` before the centre is cut out.
        interpolation: a key of `INTERPOLATIONS`.
    """

    size: int
    share: float
    interpolation: str

    def centre(self, image: Image) -> Image:
        """The middle of the image, as in evaluation."""
        shorter = math.floor(self.size / self.share)
        width, height = image.size
        if width <= height:
            target = (shorter, int(shorter * height / width))
        else:
            target = (int(shorter * width / height), shorter)
        if target != image.size:
            image = image.resize(target, INTERPOLATIONS[self.interpolation])
        left, top = (round((side - self.size) / 2) for side in target)
        return image.crop((left, top, left + self.size, top + self.size))

    def box(self, image: Image, box: tuple[int, int, int, int]) -> Image:
        """The part (left, top, right, bottom) of the image, resized."""
        return image.resize((self.size, self.size), INTERPOLATIONS[self.interpolation], box)


def random_box(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """A random part of 8 to 100 % of the area and a ratio of 3/4 to 4/3: Inception's crop."""
    draws = torch.rand(ATTEMPTS, 4, generator=generator, dtype=torch.float64).tolist()
    for area, ratio, x, y in draws:
        wanted = width * height * (AREA[0] + area * (AREA[1] - AREA[0]))
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        aspect = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(wanted * aspect)), round(math.sqrt(wanted / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def to_array(image: Image) -> NDArray[np.uint8]:
    """(1 or 3, H, W) uint8."""
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def augmented(
    image: Image, crop: Crop, augment: str, generator: torch.Generator | None
) -> NDArray[np.uint8]:
    """The image as an array (1 or 3, size, size), changed at random where a generator says how.

    `imagenet` cuts out a random part and mirrors; `light` mirrors and displaces the centre by up
    to a sixteenth of its size, black moving in.
    """
    if generator is None or augment == "none":
        return to_array(crop.centre(image))
    if augment == "imagenet":
        array = to_array(crop.box(image, random_box(*image.size, generator)))
    else:
        array = to_array(crop.centre(image))
        most = max(1, crop.size // 16)
        x, y = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
        array = displaced(array, x, y)
    mirror = torch.rand((), generator=generator) < 0.5
    return array[..., ::-1] if mirror else array


def displaced(array: NDArray[np.uint8], x: int, y: int) -> NDArray[np.uint8]:
    """The image (C, H, W) moved right by `x` and down by `y` pixels, zeros moving in."""
    _, height, width = array.shape
    moved = np.zeros_like(array)
    moved[:, max(0, y) : height + min(0, y), max(0, x) : width + min(0, x)] = array[
        :, max(0, -y) : height + min(0, -y), max(0, -x) : width + min(0, -x)
    ]
    return moved


@dataclass(frozen=True, kw_only=True)
class ChannelNormalization:
    """Bytes to network inputs: `(value / 255 - mean) / std`, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, raw: Tensor) -> Tensor:
        """float32 inputs (B, 3, H, W) of bytes (B, 1 or 3, H, W); grey becomes three channels."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (raw.float().mul_(1 / 255) - mean) / std
