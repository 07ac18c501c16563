"""The argument section that describes how decoded images become the model's inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nipq_search.tasks.common.arguments import argument_error, integer, number, one_of
from nipq_search.tasks.common.sections import store
from nipq_search.tasks.vision.image_folder.transforms import (
    AUGMENTATIONS,
    INTERPOLATIONS,
    ChannelNormalization,
    Crop,
)

MIN_SIZE = 8
"""Smallest height and width of an input in pixels; image models do not support smaller ones."""


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """Size, augmentation and normalization of the images.

    If `interpolation`, `crop_pct`, `mean` or `std` is None, the value in the model's pretrained
    configuration is used.

    Attributes:
        size: height and width of the input in pixels.
        augment: `none`; `light` for random horizontal flips and shifts by up to a sixteenth of the
            size; or `imagenet` for random resized crops and horizontal flips.
        interpolation: resizing filter, a key of `INTERPOLATIONS`.
        crop_pct: share of the shorter side that the center crop keeps.
        mean: value to subtract from pixels scaled to [0, 1]; one number, or one per channel.
        std: value by which to divide the difference; one number, or one per channel.
    """

    size: int = 224
    augment: str = "none"
    interpolation: str | None = None
    crop_pct: float | None = None
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check every argument."""
        integer("size", self.size, MIN_SIZE, 10_000)
        one_of("augment", self.augment, AUGMENTATIONS)
        self.crop({})
        given = self.normalization({})
        if self.mean is not None:
            store(self, mean=given.mean)
        if self.std is not None:
            store(self, std=given.std)

    def crop(self, pretrained: Mapping[str, Any]) -> Crop:
        """Return the crop, with defaults from `pretrained`, the model's configuration."""
        interpolation = self.interpolation or str(pretrained.get("interpolation", "bicubic"))
        share = self.crop_pct
        if share is None:
            share = float(pretrained.get("crop_pct", 1.0))
        return Crop(
            size=self.size,
            share=number("crop_pct", share, 0.01, 1),
            interpolation=one_of("interpolation", interpolation, INTERPOLATIONS),
        )

    def normalization(self, pretrained: Mapping[str, Any]) -> ChannelNormalization:
        """Return the normalization, with defaults from `pretrained`, the model's configuration."""
        mean, std = (
            _channels(key, pretrained.get(key, 0.5) if value is None else value)
            for key, value in (("mean", self.mean), ("std", self.std))
        )
        if min(std) <= 0:
            raise argument_error("std", "must be greater than 0")
        return ChannelNormalization(mean=mean, std=std)


def _channels(key: str, value: Any) -> tuple[float, ...]:
    """Return `value` as one number for each of 3 channels."""
    values = value if isinstance(value, list | tuple) else [value] * 3
    finite = all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    if len(values) != 3 or not finite:
        raise argument_error(key, "give one number, or one for each of 3 channels")
    return tuple(float(v) for v in values)
