"""Transforms from a decoded image to the network's input: crop, augmentation, normalization."""

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
"""Resizing filters and the numbers by which Pillow identifies them."""

AUGMENTATIONS = ("none", "light", "imagenet")
"""Augmentations for training images."""

ATTEMPTS = 10
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Resizing and cropping of an image to `size` by `size` pixels.

    Attributes:
        size: height and width of the result in pixels.
        share: share of the shorter side that the center crop keeps; the shorter side is first
            resized to `size / share`.
        interpolation: a key of `INTERPOLATIONS`.
    """

    size: int
    share: float
    interpolation: str

    def center(self, image: Image) -> Image:
        """Return the center crop, which evaluation uses."""
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
        """Return a region (left, top, right, bottom) of the image, resized to the crop size."""
        return image.resize((self.size, self.size), INTERPOLATIONS[self.interpolation], box)


def random_box(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Draw a random region of an image, as in Inception's random resized crop.

    Args:
        width: width of the image in pixels.
        height: height of the image in pixels.
        generator: source of randomness.

    Returns:
        Left, top, right and bottom of a region with 8% to 100% of the area and an aspect ratio
        between 3/4 and 4/3. If ten attempts fail, the largest central region with a valid aspect
        ratio is returned.
    """
    draws = torch.rand(ATTEMPTS, 4, generator=generator, dtype=torch.float64).tolist()
    for area, ratio, x, y in draws:
        pixels = width * height * (AREA[0] + area * (AREA[1] - AREA[0]))
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        aspect = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def to_array(image: Image) -> NDArray[np.uint8]:
    """Return an image as an array (1 or 3, H, W)."""
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def augment_image(
    image: Image, crop: Crop, augment: str, generator: torch.Generator | None
) -> NDArray[np.uint8]:
    """Crop an image and augment it at random.

    Args:
        image: a decoded image.
        crop: size and interpolation of the result.
        augment: `none`; `imagenet` for a random resized crop, randomly flipped; or `light` for the
            center crop, randomly flipped and shifted by up to a sixteenth of its size. Flips are
            horizontal.
        generator: source of randomness; None returns the center crop.

    Returns:
        An array (1 or 3, size, size). Black fills the border that a shift uncovers.
    """
    if generator is None or augment == "none":
        return to_array(crop.center(image))
    if augment == "imagenet":
        array = to_array(crop.box(image, random_box(*image.size, generator)))
    else:
        array = to_array(crop.center(image))
        max_shift = max(1, crop.size // 16)
        x, y = torch.randint(-max_shift, max_shift + 1, (2,), generator=generator).tolist()
        array = shift_image(array, x, y)
    mirror = torch.rand((), generator=generator) < 0.5
    return array[..., ::-1] if mirror else array


def shift_image(array: NDArray[np.uint8], x: int, y: int) -> NDArray[np.uint8]:
    """Shift an image; zeros fill the uncovered border.

    Args:
        array: an image (C, H, W).
        x: shift to the right in pixels.
        y: shift downwards in pixels.

    Returns:
        A new array of the same shape.
    """
    _, height, width = array.shape
    shifted = np.zeros_like(array)
    shifted[:, max(0, y) : height + min(0, y), max(0, x) : width + min(0, x)] = array[
        :, max(0, -y) : height + min(0, -y), max(0, -x) : width + min(0, -x)
    ]
    return shifted


@dataclass(frozen=True, kw_only=True)
class ChannelNormalization:
    """Map from bytes to network inputs, per channel: `(value / 255 - mean) / std`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, raw: Tensor) -> Tensor:
        """Map bytes (B, 1 or 3, H, W) to float32 (B, 3, H, W), repeating a single channel."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (raw.float().mul_(1 / 255) - mean) / std
