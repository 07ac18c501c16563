"""Handwritten digits: scikit-learn's 1,797 grayscale images of 8x8 pixels in 10 classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from nipq_search.tasks.base import SPLITS
from nipq_search.tasks.common.arguments import positive, positives, seed
from nipq_search.tasks.common.arrays import Normalization, Split, stratified
from nipq_search.tasks.common.extras import requires_extra
from nipq_search.tasks.vision.array_classification import ArrayClassification
from nipq_search.tasks.vision.resnet import ResNet


class Digits(ArrayClassification):
    """The task of the demo; an epoch takes a fraction of a second on one core.

    Args:
        split_seed: seed for the division into splits.
        width: number of channels in the network's first stage.
        blocks: number of basic blocks in each stage of the network.
    """

    name = "digits"
    normalization = Normalization(scale=16.0, mean=0.3053, std=0.3760)
    sizes = (1097, 300, 400)

    def __init__(
        self, *, split_seed: int = 0, width: int = 8, blocks: Sequence[int] = (1, 1)
    ) -> None:
        """Check and store the arguments; the data are read later."""
        self.split_seed = seed("split_seed", split_seed)
        self.width = positive("width", width)
        self.blocks = positives("blocks", blocks)

    def read_splits(self) -> Mapping[str, Split]:
        """Return stratified splits of 1,097, 300 and 400 images."""
        with requires_extra("task digits", "digits"):
            from sklearn.datasets import load_digits
        images, labels = load_digits(return_X_y=True)
        images = images.astype(np.uint8).reshape(-1, 1, 8, 8)
        labels = labels.astype(np.int64)
        indices = stratified(labels, self.sizes, self.split_seed)
        return {
            name: Split(images=images[index], labels=labels[index])
            for name, index in zip(SPLITS, indices, strict=True)
        }

    def build_model(self) -> nn.Module:
        """Return a residual network for 8x8 images, by default with two stages."""
        return ResNet(width=self.width, blocks=self.blocks)
