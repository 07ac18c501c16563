"""Classification of images that lie in folders, Parquet files or IDX files, with timm's models."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nipq_search.tasks.base import check_batch_size, evaluating, move, named_split
from nipq_search.tasks.common.arguments import number
from nipq_search.tasks.common.arrays import Split, digest_splits
from nipq_search.tasks.common.package_files import needed
from nipq_search.tasks.vision.image_folder.batches import Batch, ImageBatches, decoded
from nipq_search.tasks.vision.image_folder.data import ImageData
from nipq_search.tasks.vision.image_folder.models import ImageModel, ImageTeacher, Teacher
from nipq_search.tasks.vision.image_folder.preprocessing import ImagePreprocessing
from nipq_search.tasks.vision.image_folder.splits import ImageSplit, fingerprint
from nipq_search.tasks.vision.image_folder.timm_models import check_size, data_config

EVALUATION_BATCH = 256


class ImageFolder:
    """Classification of images with a model of timm.

    Batches are (images (B, 3, size, size) float32, labels (B,) int64).

    Args:
        data: location of the images and their splits.
        model: the model and its starting weights.
        preprocessing: size, augmentation and normalization; the defaults if None.
        teacher: model that teaches in place of the float model; the float model teaches if None.
        label_smoothing: share of each training label that is spread evenly over all classes.

    Raises:
        UserError: a library is missing, or the model or teacher does not accept the image size.
    """

    name = "image_folder"
    metric: tuple[str, str] = ("accuracy", "max")
    input_bits: int | None = 8
    argument_sections: ClassVar[Mapping[str, type]] = {
        "data": ImageData,
        "model": ImageModel,
        "preprocessing": ImagePreprocessing,
        "teacher": ImageTeacher,
    }

    def __init__(
        self,
        *,
        data: ImageData,
        model: ImageModel,
        preprocessing: ImagePreprocessing | None = None,
        teacher: ImageTeacher | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        """Check the sections against each other; the data are read later."""
        for module in ("timm", "PIL", "torchmetrics"):
            with needed("task image_folder", "vision"):
                importlib.import_module(module)
        preprocessing = preprocessing or ImagePreprocessing()
        self.data, self.model, self.teacher = data, model, teacher or ImageTeacher()
        for name in (model.model, self.teacher.teacher):
            check_size(name, preprocessing.size)
        pretrained = data_config(model.model)
        self.crop = preprocessing.crop(pretrained)
        self.normalization = preprocessing.normalization(pretrained)
        self.augment = preprocessing.augment
        self.label_smoothing = number("label_smoothing", label_smoothing, 0, 0.999)
        self._splits: Mapping[str, ImageSplit | Split] | None = None

    def load_data(self) -> None:
        """List the images, and decode them where `cache` is `memory`; once."""
        if self._splits is not None:
            return
        found = self.data.find()
        chosen = self.data.choose(found)
        with torch.random.fork_rng():
            # Building the teacher here reports its errors before training starts.
            self._teacher(len(found.classes))
        splits: dict[str, ImageSplit | Split] = {**chosen}
        if self.data.cache == "memory":
            threads = max(1, self.data.workers)
            splits = {name: decoded(s, self.crop, threads) for name, s in chosen.items()}
        self.classes, self._splits = found.classes, splits

    def splits(self) -> Mapping[str, ImageSplit | Split]:
        """Splits by name, read at the first call."""
        self.load_data()
        assert self._splits is not None
        return self._splits

    def split(self, name: str) -> ImageSplit | Split:
        """One split; `UserError` for an unknown name."""
        splits = self.splits()
        return named_split(splits, name)

    def dataset(self) -> dict[str, Any]:
        """Name, number of classes, sizes of the splits, and a digest.

        The digest covers every pixel where images are kept in memory. Of files that are read anew
        in every epoch it covers names and labels alone.
        """
        splits = self.splits()
        arrays = {name: split for name, split in splits.items() if isinstance(split, Split)}
        files = {name: split for name, split in splits.items() if isinstance(split, ImageSplit)}
        return {
            "name": self.name,
            "classes": len(self.classes),
            "splits": {name: len(split) for name, split in splits.items()},
            "digest": digest_splits(arrays) if arrays else fingerprint(files),
        }

    def build_model(self) -> nn.Module:
        """The model for the data's classes, with its starting weights."""
        self.load_data()
        return self.model.build(len(self.classes))

    def build_teacher(self) -> nn.Module | None:
        """The teacher in evaluation mode; None where the float model teaches."""
        self.load_data()
        return self._teacher(len(self.classes))

    def _teacher(self, classes: int) -> nn.Module | None:
        model = self.teacher.build(classes)
        if model is None or self.teacher.teacher is None:
            return None
        own = ImagePreprocessing().normalization(data_config(self.teacher.teacher))
        return self.model.lay_out(Teacher(model, own, self.normalization)).eval()

    def example_inputs(self) -> tuple[Tensor]:
        """One image of the training split, shape (1, 3, size, size)."""
        images, _ = next(iter(self._batches("train", 1, None)))
        return (images,)

    def loader(self, split: str, batch_size: int, seed: int | None = None) -> ImageBatches:
        """One epoch; `seed` orders and augments the training split and is unused elsewhere."""
        check_batch_size(batch_size)
        return self._batches(
            split, batch_size, seed if split == "train" else None, self.data.workers
        )

    def _batches(
        self, split: str, batch_size: int, seed: int | None, workers: int = 0
    ) -> ImageBatches:
        images = self.split(split)
        cached = isinstance(images, Split)
        return ImageBatches(
            split=images,
            # What is in memory has been cut out already.
            crop=dataclasses.replace(self.crop, share=1.0) if cached else self.crop,
            normalization=self.normalization,
            batch_size=batch_size,
            seed=seed,
            augment=self.augment,
            workers=0 if cached else workers,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats, with smoothed labels where asked for."""
        images, labels = batch
        return F.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)

    def distill_loss(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy with the teacher's probabilities at temperature 1, in nats."""
        images, _ = batch
        with torch.no_grad():
            probabilities = teacher(images).softmax(dim=1)
        return F.cross_entropy(model(images), probabilities)

    def num_samples(self, batch: Batch) -> int:
        """Images in the batch."""
        return len(batch[1])

    def to_device(self, batch: Batch, device: torch.device | str) -> Batch:
        """The batch on `device`, in the model's memory layout."""
        images, labels = move(batch, device)
        if self.model.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """`accuracy`, `top5` where there are more than 5 classes, and mean `loss` in nats."""
        from torchmetrics.classification import MulticlassAccuracy

        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
        classes = len(self.classes)
        hits = {"accuracy": 1, "top5": 5} if classes > 5 else {"accuracy": 1}
        metrics = {
            name: MulticlassAccuracy(classes, top_k=k, average="micro").to(device)
            for name, k in hits.items()
        }
        loss = torch.zeros((), dtype=torch.float64, device=device)
        with evaluating(model):
            for batch in self.loader(split, EVALUATION_BATCH):
                images, labels = self.to_device(batch, device)
                outputs = model(images).float()
                loss += F.cross_entropy(outputs, labels, reduction="sum")
                for metric in metrics.values():
                    metric.update(outputs, labels)
        figures = {name: float(metric.compute()) for name, metric in metrics.items()}
        return {**figures, "loss": float(loss) / len(self.split(split))}
