"""The task `image_folder`: classification of images in folders, Parquet or IDX files."""

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
from nipq_search.tasks.common.extras import requires_extra
from nipq_search.tasks.vision.image_folder.batches import Batch, ImageBatches, decode_split
from nipq_search.tasks.vision.image_folder.data import ImageData
from nipq_search.tasks.vision.image_folder.models import ImageModel, ImageTeacher, Teacher
from nipq_search.tasks.vision.image_folder.preprocessing import ImagePreprocessing
from nipq_search.tasks.vision.image_folder.splits import ImageSplit, fingerprint
from nipq_search.tasks.vision.image_folder.timm_models import check_size, data_config

EVALUATION_BATCH = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedImages:
    """The images by split, decoded or not, and the names of the classes, in order."""

    splits: Mapping[str, ImageSplit | Split]
    classes: tuple[str, ...]


class ImageFolder:
    """Classification of images with a timm model.

    Batches are (images (B, 3, size, size) float32, labels (B,) int64).

    Args:
        data: location of the images and their splits.
        model: the model and its starting weights.
        preprocessing: size, augmentation and normalization; None uses the defaults.
        teacher: model to use as the teacher; None uses the float model.
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
            with requires_extra("task image_folder", "vision"):
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
        self._loaded: LoadedImages | None = None

    def load_data(self) -> None:
        """Find the images, and decode them if `cache` is `memory`; later calls have no effect.

        This also builds the teacher once, to report its errors before training starts.
        """
        if self._loaded is not None:
            return
        found = self.data.find()
        chosen = self.data.choose(found)
        with torch.random.fork_rng():
            self._build_teacher(len(found.classes))
        splits: dict[str, ImageSplit | Split] = {**chosen}
        if self.data.cache == "memory":
            threads = max(1, self.data.workers)
            splits = {name: decode_split(s, self.crop, threads) for name, s in chosen.items()}
        self._loaded = LoadedImages(splits=splits, classes=found.classes)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in order."""
        return self.loaded().classes

    def loaded(self) -> LoadedImages:
        """Return the splits and classes, which are read on the first call."""
        self.load_data()
        assert self._loaded is not None
        return self._loaded

    def split(self, name: str) -> ImageSplit | Split:
        """Return one split, or raise `UserError` if the name is unknown."""
        return named_split(self.loaded().splits, name)

    def dataset(self) -> dict[str, Any]:
        """Return the name, number of classes, split sizes and digest of the data.

        For images in memory, the digest covers every pixel; for files that are read in every
        epoch, it covers only their names and labels.
        """
        splits = self.loaded().splits
        arrays = {name: split for name, split in splits.items() if isinstance(split, Split)}
        files = {name: split for name, split in splits.items() if isinstance(split, ImageSplit)}
        return {
            "name": self.name,
            "classes": len(self.classes),
            "splits": {name: len(split) for name, split in splits.items()},
            "digest": digest_splits(arrays) if arrays else fingerprint(files),
        }

    def build_model(self) -> nn.Module:
        """Return a new model for the classes of the data, with its starting weights."""
        return self.model.build(len(self.classes))

    def build_teacher(self) -> nn.Module | None:
        """Return the teacher in evaluation mode, or None if the float model is the teacher."""
        return self._build_teacher(len(self.classes))

    def _build_teacher(self, classes: int) -> nn.Module | None:
        """Return the teacher, adapted to this task's normalization, or None if there is none."""
        model = self.teacher.build(classes)
        if model is None or self.teacher.teacher is None:
            return None
        own = ImagePreprocessing().normalization(data_config(self.teacher.teacher))
        return self.model.lay_out(Teacher(model, own, self.normalization)).eval()

    def example_inputs(self) -> tuple[Tensor]:
        """Return one training image of shape (1, 3, size, size)."""
        images, _ = next(iter(self._batches("train", 1, None)))
        return (images,)

    def loader(self, split: str, batch_size: int, seed: int | None = None) -> ImageBatches:
        """Return one epoch of a split.

        Args:
            split: `train`, `validation` or `test`.
            batch_size: images per batch.
            seed: seed for the order and the augmentation; used for the training split only.

        Returns:
            Batches of images and labels.
        """
        check_batch_size(batch_size)
        used = seed if split == "train" else None
        return self._batches(split, batch_size, used, self.data.workers)

    def _batches(
        self, split: str, batch_size: int, seed: int | None, workers: int = 0
    ) -> ImageBatches:
        images = self.split(split)
        cached = isinstance(images, Split)
        return ImageBatches(
            split=images,
            # Images in memory have already been cropped.
            crop=dataclasses.replace(self.crop, share=1.0) if cached else self.crop,
            normalization=self.normalization,
            batch_size=batch_size,
            seed=seed,
            augment=self.augment,
            workers=0 if cached else workers,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy in nats, with label smoothing."""
        images, labels = batch
        return F.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)

    def distill_loss(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy with the teacher's probabilities as targets.

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
        """Return a batch on `device`, in the memory layout of the model."""
        images, labels = move(batch, device)
        if self.model.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return the `accuracy`, the mean `loss` in nats and, with more than 5 classes, `top5`."""
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
        values = {name: float(metric.compute()) for name, metric in metrics.items()}
        return {**values, "loss": float(loss) / len(self.split(split))}
