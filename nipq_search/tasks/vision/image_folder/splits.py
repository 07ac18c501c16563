"""Division of images into splits, which are separate folders or held-out shares."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nipq_search.errors import UserError
from nipq_search.tasks.base import SPLITS
from nipq_search.tasks.common.arguments import check_limit
from nipq_search.tasks.common.arrays import stratified
from nipq_search.tasks.vision.image_folder.sources import (
    USUAL_NAMES,
    FoundImages,
    ImageSource,
    SplitNames,
)

DEFAULT_SHARE = 0.1
"""Share of the training images to hold out for a split that has no images of its own."""

ImageSplitSource = str | float | None
"""Origin of a split: a folder's name, a share of the training images, or None to detect it."""


@dataclass(frozen=True, kw_only=True)
class ImageSplit:
    """A selection of a source's images: their indices (N,) and their class indices (N,)."""

    source: ImageSource
    index: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


def split_names(validation: ImageSplitSource, test: ImageSplitSource) -> SplitNames:
    """Return the folder names to search for, by split.

    A split that is held out from the training images has no names.

    Raises:
        UserError: a source is not a name, a share between 0 and 1, or None.
    """
    names: dict[str, tuple[str, ...]] = {"train": USUAL_NAMES["train"]}
    for split, source in (("validation", validation), ("test", test)):
        if isinstance(source, str):
            names[split] = (source,)
        elif source is None:
            names[split] = USUAL_NAMES[split]
        elif isinstance(source, bool) or not isinstance(source, float | int) or not 0 < source < 1:
            raise UserError(
                f"task_args.{split}: {source!r} is not a share; use a number between 0 and 1, or "
                "the name of a folder"
            )
        else:
            names[split] = ()
    return names


def choose_images(
    found: FoundImages,
    *,
    validation: ImageSplitSource,
    test: ImageSplitSource,
    limits: Mapping[str, int | None],
    seed: int,
) -> dict[str, ImageSplit]:
    """Draw the held-out splits from the training images, and apply the limits to all splits.

    All draws are stratified by class. Shares are held out before the limits apply, so they do not
    depend on the limit for `train`.

    Args:
        found: the images.
        validation: origin of the validation split.
        test: origin of the test split.
        limits: maximum number of images by split; None means no limit.
        seed: seed for all random draws.

    Returns:
        The images of each split.

    Raises:
        UserError: a named folder is missing, or there are too few images.
    """
    train = found.splits["train"]
    shares = {}
    for split, source in (("validation", validation), ("test", test)):
        if split not in found.splits:
            if isinstance(source, str):
                raise UserError(f"task_args.{split}: the data contain no split named '{source}'")
            shares[split] = max(1, round((source or DEFAULT_SHARE) * len(train.labels)))
    rest = len(train.labels) - sum(shares.values())
    if rest < 1:
        raise UserError(
            f"task_args.path: {len(train.labels)} training images are too few: the validation and "
            f"test splits take {sum(shares.values())} of them, and none are left for training"
        )
    sizes = {**shares, "train": rest}
    drawn = dict(zip(sizes, stratified(train.labels, list(sizes.values()), seed), strict=True))
    splits = {}
    for split in SPLITS:
        images = train if split in drawn else found.splits[split]
        index, limit = drawn.get(split), limits[split]
        available = len(images.labels) if index is None else len(index)
        check_limit(f"{split}_samples", limit, available)
        if index is None:
            (index,) = stratified(images.labels, [limit or available], seed)
        index = np.sort(index[: limit or available])
        splits[split] = ImageSplit(source=images.source, index=index, labels=images.labels[index])
    return splits


def fingerprint(splits: Mapping[str, ImageSplit]) -> str:
    """Return the SHA-256 of the splits without decoding any image, in hexadecimal."""
    total = hashlib.sha256()
    for name, split in splits.items():
        total.update(name.encode() + split.source.fingerprint())
        total.update(split.index.data)
        total.update(split.labels.data)
    return total.hexdigest()
