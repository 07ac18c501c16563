"""Labeled arrays in memory: stratified splits, and batches that depend only on a seed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Images (N, C, H, W) as uint8 and their labels (N,) as int64.

    Both are numpy arrays, because Ray's object store shares arrays between the processes of a node
    without copying them. Shared arrays are read-only, so no method writes to them.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalization:
    """Map from raw values to network inputs: `(value / scale - mean) / std`."""

    scale: float
    mean: float
    std: float

    def __call__(self, raw: Tensor) -> Tensor:
        """Return float32 inputs of the same shape."""
        return raw.float().mul_(1.0 / (self.scale * self.std)).sub_(self.mean / self.std)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """One epoch of a split, including the last partial batch; each pass yields equal batches.

    Attributes:
        split: the images.
        normalization: map from raw values to inputs.
        batch_size: images per batch.
        seed: seed for the order and the shifts; None keeps the order of the arrays and disables
            the shifts.
        shift: maximum random shift in pixels; zeros fill the uncovered border.
    """

    split: Split
    normalization: Normalization
    batch_size: int
    seed: int | None = None
    shift: int = 0

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, C, H, W) float32 and labels (B,) int64."""
        generator = None
        order = np.arange(len(self.split))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(order), generator=generator).numpy()
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            # Indexing with an array makes a copy, so torch can own the result.
            raw = torch.from_numpy(self.split.images[index])
            if generator is not None and self.shift:
                raw = shift_images(raw, self.shift, generator)
            yield self.normalization(raw), torch.from_numpy(self.split.labels[index])


def shift_images(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Shift each image by a random offset; zeros fill the uncovered border.

    Args:
        images: images (N, C, H, W).
        max_shift: maximum shift in either direction, in pixels.
        generator: source of randomness.

    Returns:
        New images of the same shape and type.
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (max_shift,) * 4)
    offset = torch.randint(0, 2 * max_shift + 1, (2, count, 1), generator=generator)
    rows = (offset[0] + torch.arange(height))[:, :, None]
    columns = (offset[1] + torch.arange(width))[:, None, :]
    sample = torch.arange(count)[:, None, None]
    # A slice between index arrays moves the channels to the end.
    return padded[sample, :, rows, columns].permute(0, 3, 1, 2)


def stratified(
    labels: NDArray[Any], sizes: Sequence[int], seed: int
) -> tuple[NDArray[np.int64], ...]:
    """Draw disjoint sets of samples, each with the class proportions of the whole.

    The samples of each class are shuffled and spread evenly over one sequence, which is then cut
    into the sets. Any section of the sequence, such as the first n samples of a split, therefore
    has the same class proportions, up to rounding.

    Args:
        labels: class of each sample, (N,).
        sizes: number of samples in each set.
        seed: seed for the shuffle.

    Returns:
        The indices of each set.

    Raises:
        ValueError: the sizes add up to more than N.
    """
    if sum(sizes) > len(labels):
        raise ValueError(f"cannot draw {sum(sizes)} samples from {len(labels)}")
    # Unlike default_rng, RandomState produces the same stream in every version of numpy.
    order = np.random.RandomState(seed).permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = labels[order] == label
        count = np.count_nonzero(members)
        position[members] = (np.arange(count) + 0.5) / count
    order = order[np.argsort(position, kind="stable")].astype(np.int64)
    ends = np.cumsum(sizes)
    return tuple(order[end - size : end] for size, end in zip(sizes, ends, strict=True))


def digest_splits(splits: Mapping[str, Split]) -> str:
    """Return the SHA-256 of the names, shapes and contents of the splits, in hexadecimal."""
    total = hashlib.sha256()
    for name, split in splits.items():
        total.update(f"{name}{split.images.shape}".encode())
        total.update(np.ascontiguousarray(split.images).data)
        total.update(np.ascontiguousarray(split.labels).data)
    return total.hexdigest()
