"""Batches of images that depend only on a seed, decoded by processes or read from memory."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nipq_search.errors import UserError
from nipq_search.quant.numerics.noise import mix
from nipq_search.tasks.common.arrays import Split
from nipq_search.tasks.vision.image_folder.splits import ImageSplit
from nipq_search.tasks.vision.image_folder.transforms import (
    ChannelNormalization,
    Crop,
    augment_image,
    to_array,
)

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ImageBatches:
    """One epoch of a split, including the last partial batch; each pass yields equal batches.

    Attributes:
        split: images to decode, or decoded images (N, 1 or 3, size, size).
        crop: size and interpolation of the images.
        normalization: map from bytes to inputs.
        batch_size: images per batch.
        seed: seed for the order and the augmentation; None keeps the order and disables the
            augmentation.
        augment: one of `AUGMENTATIONS`.
        workers: number of processes that decode images; 0 decodes in the calling process.
    """

    split: ImageSplit | Split
    crop: Crop
    normalization: ChannelNormalization
    batch_size: int
    seed: int | None = None
    augment: str = "none"
    workers: int = 0

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield images (B, 3, size, size) float32 and labels (B,) int64."""
        order = np.arange(len(self.split))
        generator = torch.Generator()
        if self.seed is not None:
            order = torch.randperm(len(order), generator=generator.manual_seed(self.seed)).numpy()
        size = self.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if self.workers == 0:
            yield from map(self.batch, batches)
            return
        # Each item is a whole batch, so results do not depend on the number of workers. Without a
        # generator of its own, the loader would draw a seed from the global generator.
        loader: DataLoader[Batch | UserError] = DataLoader(
            _BatchDataset(self, batches),
            batch_size=None,
            num_workers=min(self.workers, len(batches), available_cores()),
            generator=generator,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch from batch.below
            yield batch[0], batch[1]

    def batch(self, positions: NDArray[np.int64]) -> Batch:
        """Return the inputs and labels of the images at the given positions in the split."""
        if isinstance(self.split, Split) and (self.seed is None or self.augment == "none"):
            raw = self.split.images[positions]
        else:
            with ignore_warnings():
                raw = stack_images([self._image(int(position)) for position in positions])
        # Indexing with an array makes a copy, so torch can own the result.
        return self.normalization(torch.from_numpy(raw)), torch.from_numpy(
            self.split.labels[positions]
        )

    def _image(self, position: int) -> NDArray[np.uint8]:
        """Return one image (1 or 3, size, size), augmented according to the seed."""
        generator = None
        if self.seed is not None and self.augment != "none":
            # A seed per image makes the result independent of the worker and the batch.
            generator = torch.Generator().manual_seed(mix(self.seed, position) & 0x7FFFFFFF)
        if isinstance(self.split, ImageSplit):
            image = self.split.source.open(int(self.split.index[position]))
        else:
            image = to_image(self.split.images[position])
        return augment_image(image, self.crop, self.augment, generator)


@contextlib.contextmanager
def ignore_warnings() -> Iterator[None]:
    """Suppress all warnings, such as Pillow's about large images. Not thread-safe."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def available_cores() -> int:
    """Return the number of cores available to this process.

    torch warns if a data loader has more workers than this.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _BatchDataset(Dataset[Batch | UserError]):
    """Whole batches by index, for worker processes; a `UserError` is returned as a value.

    If a worker raised the error instead, its message in the calling process would contain a
    traceback.
    """

    def __init__(self, batches: ImageBatches, positions: list[NDArray[np.int64]]) -> None:
        self.batches, self.positions = batches, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Batch | UserError:
        try:
            return self.batches.batch(self.positions[index])
        except UserError as error:
            error.below = error.__cause__  # pickling drops the cause
            return error


def stack_images(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Stack images into (N, C, H, W); among color images, grayscale images get three channels."""
    channels = max(len(image) for image in images)
    return np.stack([image if len(image) == channels else image.repeat(3, 0) for image in images])


def decode_split(split: ImageSplit, crop: Crop, threads: int = 1) -> Split:
    """Decode all images of a split into memory.

    Args:
        split: the images.
        crop: size of the center crop to keep.
        threads: number of threads that decode images.

    Returns:
        Images (N, 1 or 3, size, size), with one channel if all of them are grayscale.

    Raises:
        UserError: an image cannot be read, or the images would take more than half of the
            machine's memory.
    """
    required = len(split) * 3 * crop.size**2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if required > memory // 2:
        raise UserError(
            f"task_args.cache: {len(split)} decoded images take {required / 1e9:.0f} GB, but this "
            f"machine has {memory / 1e9:.0f} GB of memory; use cache: none"
        )
    images = np.empty((len(split), 3, crop.size, crop.size), dtype=np.uint8)

    def put(position: int) -> bool:
        """Decode one image into `images` and return whether it is grayscale."""
        array = to_array(crop.center(split.source.open(int(split.index[position]))))
        images[position] = array
        return len(array) == 1

    with ignore_warnings(), ThreadPoolExecutor(max_workers=threads) as pool:
        gray = all(list(pool.map(put, range(len(split)))))
    return Split(images=images[:, :1].copy() if gray else images, labels=split.labels)


def to_image(array: NDArray[np.uint8]) -> Image:
    """Return an array (1 or 3, H, W) as an image."""
    from PIL import Image

    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
