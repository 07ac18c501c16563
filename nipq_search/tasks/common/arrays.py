"""Labelled arrays in memory: stratified splits, and batches that are functions of a seed."""

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

    They stay numpy arrays, because Ray's object store hands those to every process of a node
    without a copy. Such arrays are read-only, so nothing here writes to them.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalization:
    """Raw values to network inputs: `(value / scale - mean) / std`."""

    scale: float
    mean: float
    std: float

    def __call__(self, raw: Tensor) -> Tensor:
        """float32 inputs of the same shape."""
        return raw.float().mul_(1.0 / (self.scale * self.std)).sub_(self.mean / self.std)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """One epoch of a split, the last partial batch included; each iteration gives the same.

    Attributes:
        seed: order and shifts; None keeps the order of the arrays and shifts nothing.
        shift: greatest random displacement in pixels, filled in with zeros.
    """

    split: Split
    normalization: Normalization
    batch_size: int
    seed: int | None = None
    shift: int = 0

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) float32 and labels (B,) int64, batch by batch."""
        generator = None
        order = np.arange(len(self.split))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(order), generator=generator).numpy()
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            # Indexing by an array copies, so torch may own the result.
            raw = torch.from_numpy(self.split.images[index])
            if generator is not None and self.shift:
                raw = shifted(raw, self.shift, generator)
            yield self.normalization(raw), torch.from_numpy(self.split.labels[index])


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each of the images (N, C, H, W) displaced by up to `most` pixels, zeros moving in."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (most, most, most, most))
    offset = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator)
    rows = (offset[0] + torch.arange(height))[:, :, None]
    columns = (offset[1] + torch.arange(width))[:, None, :]
    sample = torch.arange(count)[:, None, None]
    # The slice between the index arrays puts the channels last.
    return padded[sample, :, rows, columns].permute(0, 3, 1, 2)


def stratified(
    labels: NDArray[Any], sizes: Sequence[int], seed: int
) -> tuple[NDArray[np.int64], ...]:
    """Disjoint index arrays of exactly the given sizes, each with the classes in proportion.

    Every class is shuffled and spread evenly over one sequence, which is then cut. Any part of
    the sequence, the first n of a split too, therefore has the classes in proportion.

    Raises:
        ValueError: the sizes add up to more than there is.
    """
    if sum(sizes) > len(labels):
        raise ValueError(f"splits of {sum(sizes)} samples out of {len(labels)}")
    # The stream of RandomState never changes with numpy's version, that of default_rng may.
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
    """SHA-256 over names, shapes and contents of the splits, in hexadecimal."""
    total = hashlib.sha256()
    for name, split in splits.items():
        total.update(f"{name}{split.images.shape}".encode())
        total.update(np.ascontiguousarray(split.images).data)
        total.update(np.ascontiguousarray(split.labels).data)
    return total.hexdigest()
