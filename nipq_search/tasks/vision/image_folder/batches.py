"""Batches of images as functions of a seed, decoded by worker processes or kept in memory."""

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
    augmented,
    to_array,
)

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ImageBatches:
    """One epoch of a split, the last partial batch included; each iteration gives the same.

    Attributes:
        split: images to decode, or decoded ones (N, 1 or 3, size, size).
        crop: how an image gets its size.
        normalization: bytes to inputs.
        batch_size: images in a batch.
        seed: order and augmentation; None keeps the order and changes nothing.
        augment: one of `AUGMENTATIONS`.
        workers: processes that decode; 0 decodes in this one.
    """

    split: ImageSplit | Split
    crop: Crop
    normalization: ChannelNormalization
    batch_size: int
    seed: int | None = None
    augment: str = "none"
    workers: int = 0

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Images (B, 3, size, size) float32 and labels (B,) int64, batch by batch."""
        order = np.arange(len(self.split))
        generator = torch.Generator()
        if self.seed is not None:
            order = torch.randperm(len(order), generator=generator.manual_seed(self.seed)).numpy()
        size = self.batch_size
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        if self.workers == 0:
            yield from map(self.batch, parts)
            return
        # Each item is a whole batch, so nothing depends on which process makes it. A generator of
        # its own keeps the loader from drawing a seed from the global one.
        loader: DataLoader[Batch | UserError] = DataLoader(
            _Whole(self, parts),
            batch_size=None,
            num_workers=min(self.workers, len(parts), cores()),
            generator=generator,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch from batch.below
            yield batch[0], batch[1]

    def batch(self, numbers: NDArray[np.int64]) -> Batch:
        """Inputs and labels of the images with these positions in the split."""
        if isinstance(self.split, Split) and (self.seed is None or self.augment == "none"):
            raw = self.split.images[numbers]
        else:
            with quiet():
                raw = stack([self._image(int(number)) for number in numbers])
        # Indexing by an array copies, so torch may own the result.
        return self.normalization(torch.from_numpy(raw)), torch.from_numpy(
            self.split.labels[numbers]
        )

    def _image(self, number: int) -> NDArray[np.uint8]:
        """One image (1 or 3, size, size), augmented as the seed says."""
        generator = None
        if self.seed is not None and self.augment != "none":
            # By image rather than by position: whatever worker makes it, it is the same.
            generator = torch.Generator().manual_seed(mix(self.seed, number) & 0x7FFFFFFF)
        if isinstance(self.split, ImageSplit):
            image = self.split.source.open(int(self.split.index[number]))
        else:
            image = as_image(self.split.images[number])
        return augmented(image, self.crop, self.augment, generator)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings, such as that an image is large. Not for several threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cores() -> int:
    """Cores that this process may use. More workers only take turns, and torch warns of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Whole(Dataset[Batch | UserError]):
    """Whole batches by number, for worker processes; what is wrong comes back as a value.

    A raised error would reach the caller with the worker's traceback in its message.
    """

    def __init__(self, batches: ImageBatches, parts: list[NDArray[np.int64]]) -> None:
        self.batches, self.parts = batches, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Batch | UserError:
        try:
            return self.batches.batch(self.parts[index])
        except UserError as error:
            error.below = error.__cause__  # a pickle leaves the cause behind
            return error


def stack(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """(N, C, H, W); grey images among coloured ones get three equal channels."""
    channels = max(len(image) for image in images)
    return np.stack([image if len(image) == channels else image.repeat(3, 0) for image in images])


def decoded(split: ImageSplit, crop: Crop, threads: int = 1) -> Split:
    """The whole split in memory as (N, 1 or 3, size, size): one channel where all are grey.

    Raises:
        UserError: an image cannot be read, or all of them together do not fit into memory.
    """
    needed = len(split) * 3 * crop.size**2
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there // 2:
        raise UserError(
            f"task_args.cache: {len(split)} decoded images take {needed / 1e9:.0f} GB, and this "
            f"machine has {there / 1e9:.0f} GB of memory; use cache: none"
        )
    images = np.empty((len(split), 3, crop.size, crop.size), dtype=np.uint8)

    def put(number: int) -> bool:
        """Decode one image; whether it is grey."""
        array = to_array(crop.centre(split.source.open(int(split.index[number]))))
        images[number] = array
        return len(array) == 1

    with quiet(), ThreadPoolExecutor(max_workers=threads) as pool:
        grey = all(list(pool.map(put, range(len(split)))))
    return Split(images=images[:, :1].copy() if grey else images, labels=split.labels)


def as_image(array: NDArray[np.uint8]) -> Image:
    """The image of an array (1 or 3, H, W)."""
    from PIL import Image

    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
