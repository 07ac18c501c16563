"""Which images train, validate and test: folders of their own, or shares of the training ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nipq_search.errors import UserError
from nipq_search.tasks.base import SPLITS
from nipq_search.tasks.common.arguments import check_most
from nipq_search.tasks.common.arrays import stratified
from nipq_search.tasks.vision.image_folder.sources import NAMES, Found, Source, Wanted

SHARE = 0.1
"""Share of the training images that validates, or tests, where neither data nor file say so."""

Place = str | float | None
"""Where a split is: a folder's name, a share of the training images, or found by itself."""


@dataclass(frozen=True, kw_only=True)
class ImageSplit:
    """Some images of a source: their numbers (N,) there, and their class numbers (N,)."""

    source: Source
    index: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)


def wanted_names(validation: Place, test: Place) -> Wanted:
    """Names to look for; none for a split that is a share.

    Raises:
        UserError: a share outside of 0..1.
    """
    names: dict[str, tuple[str, ...]] = {"train": NAMES["train"]}
    for split, place in (("validation", validation), ("test", test)):
        if isinstance(place, str):
            names[split] = (place,)
        elif place is None:
            names[split] = NAMES[split]
        elif isinstance(place, bool) or not isinstance(place, float | int) or not 0 < place < 1:
            raise UserError(
                f"task_args.{split}: {place!r} is no share; use a number between 0 and 1, or the "
                "name of a folder"
            )
        else:
            names[split] = ()
    return names


def choose(
    found: Found, *, validation: Place, test: Place, caps: Mapping[str, int | None], seed: int
) -> dict[str, ImageSplit]:
    """The three splits, stratified and disjoint.

    Shares are taken from the training images first, so that they are the same whatever
    `train_samples` says.

    Args:
        found: the data.
        validation: as in the task's arguments.
        test: as in the task's arguments.
        caps: how many images of a split to use, or None for all.
        seed: decides which.

    Raises:
        UserError: a named folder is missing, or there are fewer images than asked for.
    """
    train = found.parts["train"]
    shares = {}
    for split, place in (("validation", validation), ("test", test)):
        if split not in found.parts:
            if isinstance(place, str):
                raise UserError(f"task_args.{split}: the data have no '{place}'")
            shares[split] = max(1, round((place or SHARE) * len(train.labels)))
    rest = len(train.labels) - sum(shares.values())
    if rest < 1:
        raise UserError(
            f"task_args.path: {len(train.labels)} training images are too few: "
            f"{sum(shares.values())} of them validate or test, and none is left to train"
        )
    sizes = {**shares, "train": rest}
    parts = dict(zip(sizes, stratified(train.labels, list(sizes.values()), seed), strict=True))
    splits = {}
    for split in SPLITS:
        part = train if split in parts else found.parts[split]
        index, cap = parts.get(split), caps[split]
        there = len(part.labels) if index is None else len(index)
        check_most(f"{split}_samples", cap, there)
        if index is None:
            (index,) = stratified(part.labels, [cap or there], seed)
        index = np.sort(index[: cap or there])
        splits[split] = ImageSplit(source=part.source, index=index, labels=part.labels[index])
    return splits


def fingerprint(splits: Mapping[str, ImageSplit]) -> str:
    """SHA-256 over what tells the splits apart without decoding them, in hexadecimal."""
    total = hashlib.sha256()
    for name, split in splits.items():
        total.update(name.encode() + split.source.fingerprint())
        total.update(split.index.data)
        total.update(split.labels.data)
    return total.hexdigest()
