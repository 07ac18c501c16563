"""Base class for tasks that classify images in memory."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nipq_search.tasks.base import check_batch_size, evaluating, move, named_split
from nipq_search.tasks.common.arrays import Batches, Normalization, Split, digest_splits

Batch = tuple[Tensor, Tensor]


class ArrayClassification(abc.ABC):
    """Classification of uint8 images; a subclass reads the splits and builds the model.

    Batches are (images (B, C, H, W) float32, labels (B,) int64). A pickled task contains the
    images only if `load_data` has been called.
    """

    metric: tuple[str, str] = ("accuracy", "max")
    input_bits: int | None = 8
    name: ClassVar[str]
    normalization: ClassVar[Normalization]
    shift: int = 0
    """Maximum random shift of training images in pixels."""
    evaluation_batch: ClassVar[int] = 500

    _splits: Mapping[str, Split] | None = None

    @abc.abstractmethod
    def read_splits(self) -> Mapping[str, Split]:
        """Return the arrays by split; raise `UserError` with instructions if data are missing."""

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """Return a new, untrained model."""

    def load_data(self) -> None:
        """Read the data into memory; later calls have no effect."""
        if self._splits is None:
            self._splits = self.read_splits()

    def splits(self) -> Mapping[str, Split]:
        """Return the arrays by split, which are read on the first call."""
        self.load_data()
        assert self._splits is not None
        return self._splits

    def split(self, name: str) -> Split:
        """Return the arrays of one split, or raise `UserError` if the name is unknown."""
        return named_split(self.splits(), name)

    def dataset(self) -> dict[str, Any]:
        """Return the name, number of classes, split sizes and digest of the data."""
        splits = self.splits()
        return {
            "name": self.name,
            "classes": len(np.unique(splits["train"].labels)),
            "splits": {name: len(split) for name, split in splits.items()},
            "digest": digest_splits(splits),
        }

    def example_inputs(self) -> tuple[Tensor]:
        """Return one training image of shape (1, C, H, W)."""
        raw = torch.from_numpy(self.split("train").images[np.arange(1)])
        return (self.normalization(raw),)

    def loader(self, split: str, batch_size: int, seed: int | None = None) -> Batches:
        """Return one epoch of a split.

        Args:
            split: `train`, `validation` or `test`.
            batch_size: images per batch.
            seed: seed for the order and the shifts; used for the training split only.

        Returns:
            Batches of images and labels.
        """
        check_batch_size(batch_size)
        arrays = self.split(split)
        return Batches(
            split=arrays,
            normalization=self.normalization,
            batch_size=batch_size,
            seed=seed if split == "train" else None,
            shift=self.shift,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy in nats."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def distill_loss(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy with the teacher's probabilities as targets.

        `loss` is not included. Both methods call `model` on the same tensor object, so a caller
        can pass a model that caches its last output.

        Args:
            model: the model to train.
            teacher: the model to imitate; its probabilities are computed at temperature 1.
            batch: images and labels; the labels are ignored.

        Returns:
            A scalar in nats.
        """
        images, _ = batch
        with torch.no_grad():
            probabilities = teacher(images).softmax(dim=1)
        return F.cross_entropy(model(images), probabilities)

    def num_samples(self, batch: Batch) -> int:
        """Return the number of images in a batch."""
        return len(batch[1])

    def to_device(self, batch: Batch, device: torch.device | str) -> Batch:
        """Return a batch on `device`."""
        moved: Batch = move(batch, device)
        return moved

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return the `accuracy`, from 0 to 1, and the mean `loss` in nats over a whole split."""
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
        correct = torch.zeros((), dtype=torch.int64, device=device)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        with evaluating(model):
            for batch in self.loader(split, self.evaluation_batch):
                images, labels = self.to_device(batch, device)
                outputs = model(images).float()
                correct += (outputs.argmax(dim=1) == labels).sum()
                loss += F.cross_entropy(outputs, labels, reduction="sum")
        count = len(self.split(split))
        return {"accuracy": int(correct) / count, "loss": float(loss) / count}
