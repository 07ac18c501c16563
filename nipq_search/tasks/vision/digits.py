"""Handwritten digits: scikit-learn's 1,797 grey images of 8x8 pixels, 10 classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from nipq_search.errors import UserError
from nipq_search.tasks.base import SPLITS
from nipq_search.tasks.common.arrays import Normalization, Split, stratified
from nipq_search.tasks.vision.array_classification import ArrayClassification
from nipq_search.tasks.vision.resnet import ResNet


class Digits(ArrayClassification):
    """The demo's task: an epoch takes a fraction of a second on one core.

    Args:
        split_seed: decides which images go to which split.
        width: channels of the network's first stage.
        blocks: basic blocks in each stage of the network.
    """

    name = "digits"
    normalization = Normalization(scale=16.0, mean=0.3053, std=0.3760)
    sizes = (1097, 300, 400)

    def __init__(
        self, *, split_seed: int = 0, width: int = 8, blocks: Sequence[int] = (1, 1)
    ) -> None:
        """Keep the arguments; the data are read later."""
        self.split_seed = split_seed
        self.width = width
        self.blocks = tuple(blocks)

    def read_splits(self) -> Mapping[str, Split]:
        """Stratified splits of 1,097, 300 and 400 images."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError(
                "task digits needs scikit-learn: pip install 'nipq-search[digits]'"
            ) from error
        images, labels = load_digits(return_X_y=True)
        images = images.astype(np.uint8).reshape(-1, 1, 8, 8)
        labels = labels.astype(np.int64)
        parts = stratified(labels, self.sizes, self.split_seed)
        return {
            name: Split(images=images[index], labels=labels[index])
            for name, index in zip(SPLITS, parts, strict=True)
        }

    def build_model(self) -> nn.Module:
        """A residual network of two stages for 8x8 images."""
        return ResNet(width=self.width, blocks=self.blocks)
