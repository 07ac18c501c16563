"""Fashion-MNIST: 70,000 grey images of 28x28 pixels, 10 balanced classes of clothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nipq_search.errors import UserError
from nipq_search.tasks.common.arguments import check_most, most
from nipq_search.tasks.common.arrays import Normalization, Split, stratified
from nipq_search.tasks.common.package_files import anchored
from nipq_search.tasks.vision.array_classification import ArrayClassification
from nipq_search.tasks.vision.idx import read_idx
from nipq_search.tasks.vision.resnet import ResNet

DEFAULT_PATH = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts the files."""

VARIABLE = "NIPQ_FASHION_MNIST"
"""Environment variable that names another folder."""

CLASSES = 10


class FashionMnist(ArrayClassification):
    """Images from a folder of four IDX files, as published, gzip-compressed or plain.

    Args:
        path: the folder; without it the one in NIPQ_FASHION_MNIST, else Debian's.
        train_samples: how many of the 55,000 training images to use; all by default.
        augment: displace training images by up to two pixels.
        split_seed: decides which 5,000 images of the training file validate.
        width: channels of the network's first stage.
        blocks: basic blocks in each stage of the network.
        stem_stride: 2 halves the image at once, for a quarter of the work.
    """

    name = "fashion_mnist"
    normalization = Normalization(scale=255.0, mean=0.2860, std=0.3530)
    validation_samples = 5000

    def __init__(
        self,
        *,
        path: str | None = None,
        train_samples: int | None = None,
        augment: bool = False,
        split_seed: int = 0,
        width: int = 16,
        blocks: Sequence[int] = (1, 1, 1),
        stem_stride: int = 2,
    ) -> None:
        """Check and keep the arguments; the files are read later."""
        self.path = anchored(path)
        self.train_samples = most("train_samples", train_samples)
        self.shift = 2 if augment else 0
        self.split_seed = split_seed
        self.width = width
        self.blocks = tuple(blocks)
        self.stem_stride = stem_stride

    def folder(self) -> Path:
        """The folder that holds the files; the first one named counts, and it must exist."""
        folder = Path(self.path or os.environ.get(VARIABLE) or DEFAULT_PATH).expanduser()
        if not folder.is_dir():
            raise _missing(folder)
        return folder

    def read_splits(self) -> Mapping[str, Split]:
        """Up to 55,000 images to train, 5,000 to validate, and the 10,000 of the test file."""
        folder = self.folder()
        images, labels = _read_pair(folder, "train")
        rest = len(labels) - self.validation_samples
        if rest < 1:
            raise UserError(
                f"{folder}: the training files hold {len(labels)} images, "
                f"{self.validation_samples} of which validate; none is left to train"
            )
        check_most("train_samples", self.train_samples, rest)
        # Validation first, so that it is the same whatever train_samples says.
        sizes = (self.validation_samples, self.train_samples or rest)
        validation, train = stratified(labels, sizes, self.split_seed)
        test_images, test_labels = _read_pair(folder, "t10k")
        return {
            "train": Split(images=images[train], labels=labels[train]),
            "validation": Split(images=images[validation], labels=labels[validation]),
            "test": Split(images=test_images, labels=test_labels),
        }

    def build_model(self) -> nn.Module:
        """A residual network of three stages."""
        return ResNet(
            classes=CLASSES, width=self.width, blocks=self.blocks, stem_stride=self.stem_stride
        )


def _missing(place: Path) -> UserError:
    return UserError(
        f"{place}: no Fashion-MNIST files there; install them with `apt-get install "
        "dataset-fashion-mnist`, or name their folder with `task_args: {path: FOLDER}`"
    )


def _find(folder: Path, name: str) -> Path:
    """`name` in the folder, with or without `.gz`."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise _missing(folder / name)


def _read_pair(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 1, H, W) and labels (N,) of one part, checked against each other."""
    image_file = _find(folder, f"{part}-images-idx3-ubyte")
    label_file = _find(folder, f"{part}-labels-idx1-ubyte")
    images = read_idx(image_file, 3)[:, None]
    labels = read_idx(label_file, 1).astype(np.int64)
    if len(images) != len(labels):
        raise UserError(
            f"{label_file}: holds {len(labels)} labels for {len(images)} images; "
            "install the files again"
        )
    if len(labels) and labels.max() >= CLASSES:
        raise UserError(f"{label_file}: has label {labels.max()}, but there are {CLASSES} classes")
    return images, labels
