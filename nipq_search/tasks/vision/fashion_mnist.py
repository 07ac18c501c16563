"""Fashion-MNIST: 70,000 grayscale images of 28x28 pixels in 10 balanced classes of clothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nipq_search.errors import UserError
from nipq_search.tasks.common.arguments import (
    check_limit,
    positive,
    positives,
    sample_limit,
    seed,
)
from nipq_search.tasks.common.arrays import Normalization, Split, stratified
from nipq_search.tasks.common.package_files import absolute_if_exists
from nipq_search.tasks.vision.array_classification import ArrayClassification
from nipq_search.tasks.vision.idx import read_idx
from nipq_search.tasks.vision.resnet import ResNet

DEFAULT_PATH = "/usr/share/datasets/fashion-mnist"
"""Folder in which Debian's package dataset-fashion-mnist installs the files."""

VARIABLE = "NIPQ_FASHION_MNIST"
"""Environment variable that overrides the default folder."""

CLASSES = 10


class FashionMnist(ArrayClassification):
    """Images from a folder with the four published IDX files, gzip-compressed or plain.

    Args:
        path: the folder; by default, the value of the environment variable NIPQ_FASHION_MNIST or,
            if the variable is not set, the folder of Debian's package.
        train_samples: maximum number of the 55,000 training images to use; all by default.
        augment: whether to shift training images at random by up to two pixels.
        split_seed: seed for selecting the 5,000 validation images from the training file.
        width: number of channels in the network's first stage.
        blocks: number of basic blocks in each stage of the network.
        stem_stride: stride of the stem; 2 reduces the network's computation to a quarter.
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
        """Check and store the arguments; the files are read later."""
        self.path = absolute_if_exists(path)
        self.train_samples = sample_limit("train_samples", train_samples)
        self.shift = 2 if augment else 0
        self.split_seed = seed("split_seed", split_seed)
        self.width = positive("width", width)
        self.blocks = positives("blocks", blocks)
        self.stem_stride = stem_stride

    def folder(self) -> Path:
        """Return the folder of the files, or raise `UserError` if it does not exist.

        The argument takes precedence over the environment variable, which takes precedence over
        the default.
        """
        folder = Path(self.path or os.environ.get(VARIABLE) or DEFAULT_PATH).expanduser()
        if not folder.is_dir():
            raise _missing_error(folder)
        return folder

    def read_splits(self) -> Mapping[str, Split]:
        """Return up to 55,000 training, 5,000 validation and 10,000 test images."""
        folder = self.folder()
        images, labels = _read_pair(folder, "train")
        rest = len(labels) - self.validation_samples
        if rest < 1:
            raise UserError(
                f"{folder}: the training files have {len(labels)} images, and the validation "
                f"split takes {self.validation_samples} of them; none are left for training"
            )
        check_limit("train_samples", self.train_samples, rest)
        # The validation split is drawn first, so it does not depend on train_samples.
        sizes = (self.validation_samples, self.train_samples or rest)
        validation, train = stratified(labels, sizes, self.split_seed)
        test_images, test_labels = _read_pair(folder, "t10k")
        return {
            "train": Split(images=images[train], labels=labels[train]),
            "validation": Split(images=images[validation], labels=labels[validation]),
            "test": Split(images=test_images, labels=test_labels),
        }

    def build_model(self) -> nn.Module:
        """Return a residual network, by default with three stages."""
        return ResNet(
            classes=CLASSES, width=self.width, blocks=self.blocks, stem_stride=self.stem_stride
        )


def _missing_error(place: Path) -> UserError:
    """Return the error for a missing file or folder."""
    return UserError(
        f"{place}: no Fashion-MNIST files; install them with `apt-get install "
        "dataset-fashion-mnist`, or name their folder with `task_args: {path: FOLDER}`"
    )


def _find(folder: Path, name: str) -> Path:
    """Return the path of `name` in the folder, with or without `.gz`."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise _missing_error(folder / name)


def _read_pair(folder: Path, prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the images (N, 1, H, W) and labels (N,) in the two files with a given prefix."""
    image_file = _find(folder, f"{prefix}-images-idx3-ubyte")
    label_file = _find(folder, f"{prefix}-labels-idx1-ubyte")
    images = read_idx(image_file, 3)[:, None]
    labels = read_idx(label_file, 1).astype(np.int64)
    if len(images) != len(labels):
        raise UserError(
            f"{label_file}: has {len(labels)} labels for {len(images)} images; "
            "install the files again"
        )
    if len(labels) and labels.max() >= CLASSES:
        raise UserError(
            f"{label_file}: has label {labels.max()}; labels must be from 0 to {CLASSES - 1}"
        )
    return images, labels
