"""Classification of images that lie in folders, Parquet files or IDX files, with timm's models."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nipq_search.tasks.base import check_batch_size, evaluating, move, named_split
from nipq_search.tasks.common.arguments import flag, integer, most, number, one_of, seed, text
from nipq_search.tasks.common.arrays import Split, digest_splits
from nipq_search.tasks.common.package_files import needed, resolve
from nipq_search.tasks.vision.image_folder.batches import Batch, ImageBatches, decoded
from nipq_search.tasks.vision.image_folder.models import (
    PRETRAINED,
    ModelConfig,
    Teacher,
    check_name,
    check_size,
    data_config,
)
from nipq_search.tasks.vision.image_folder.normalization import normalization
from nipq_search.tasks.vision.image_folder.search import find
from nipq_search.tasks.vision.image_folder.splits import (
    ImageSplit,
    Place,
    choose,
    fingerprint,
    wanted_names,
)
from nipq_search.tasks.vision.image_folder.transforms import (
    AUGMENTATIONS,
    INTERPOLATIONS,
    Crop,
)

FORMATS = ("folder", "parquet", "idx")
CACHES = ("memory", "none")
EVALUATION_BATCH = 256
LEAST_SIZE = 8
"""Below so many pixels a side nothing can be seen, and no model works."""


class ImageFolder:
    """Images by class, and a model of timm's.

    Batches are (images (B, 3, size, size) float32, labels (B,) int64).

    Args:
        path: a folder with `train`, `val` and `test` folders of class folders, or of class
            folders alone; a Parquet file, or a folder of some; or a folder of IDX files.
        model: timm's name of the model.
        format: `folder`, `parquet` or `idx`; found out by default.
        image: Parquet column of the images: bytes, or a struct with `bytes`.
        label: Parquet column of the labels: integers or text.
        weights: starting weights: None, `timm` for timm's own, a file, or `package://NAME/FILE`.
        weights_order: the file's entries are the model's in order, whatever they are called.
        teacher: timm's name of a model that teaches instead of the float model.
        teacher_weights: as `weights`.
        size: pixels of either side of the input.
        validation: the folder that validates, or a share of the training images; by default the
            folder that is named so, else a tenth.
        test: likewise.
        train_samples: how many training images to use; all by default.
        validation_samples: likewise.
        test_samples: likewise.
        split_seed: decides what is a share, and which images `..._samples` keep.
        augment: `none`; `light`, mirrored and moved by up to a sixteenth; or `imagenet`, random
            resized crops, mirrored.
        interpolation: way to resize; the model's own by default, as the next three.
        crop_pct: share of the shorter side that the centre crop keeps.
        mean: what is subtracted, for bytes scaled to 0..1; a number or one per channel.
        std: what is divided by after that.
        cache: `memory` keeps decoded images, `none` reads each from disk in every epoch.
        workers: processes that read and decode where there is no cache.
        label_smoothing: share of a label that goes to all classes alike, in training.
        drop_rate: dropout before the classifier.
        drop_path_rate: greatest stochastic depth.
        norm_momentum: share of a batch in running statistics; the model's own by default.
        channels_last: memory layout that suits GPUs.
    """

    name = "image_folder"
    metric: tuple[str, str] = ("accuracy", "max")
    input_bits: int | None = 8

    def __init__(
        self,
        *,
        path: str,
        model: str,
        format: str | None = None,
        image: str = "image",
        label: str = "label",
        weights: str | None = None,
        weights_order: bool = False,
        teacher: str | None = None,
        teacher_weights: str | None = PRETRAINED,
        size: int = 224,
        validation: Place = None,
        test: Place = None,
        train_samples: int | None = None,
        validation_samples: int | None = None,
        test_samples: int | None = None,
        split_seed: int = 0,
        augment: str = "none",
        interpolation: str | None = None,
        crop_pct: float | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        cache: str = "memory",
        workers: int = 0,
        label_smoothing: float = 0.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_momentum: float | None = None,
        channels_last: bool = False,
    ) -> None:
        """Check and keep the arguments; the data are read later."""
        for module in ("timm", "PIL", "torchmetrics"):
            with needed("task image_folder", "vision"):
                importlib.import_module(module)
        if format is not None:
            one_of("format", format, FORMATS)
        check_name(model, "model")
        if teacher is not None:
            check_name(teacher, "teacher")
        known = data_config(model)
        interpolation = interpolation or str(known.get("interpolation", "bicubic"))
        for name in (model, teacher):
            check_size(name, integer("size", size, LEAST_SIZE, 10_000))
        share = crop_pct if crop_pct is not None else float(known.get("crop_pct", 1.0))
        self.crop = Crop(
            size=size,
            share=number("crop_pct", share, 0.01, 1),
            interpolation=one_of("interpolation", interpolation, INTERPOLATIONS),
        )
        self.path = resolve(path, "task_args.path")
        self.format, self.columns = format, (text("image", image), text("label", label))
        self.places: tuple[Place, Place] = (validation, test)
        self.wanted = wanted_names(validation, test)
        self.caps = {
            "train": most("train_samples", train_samples),
            "validation": most("validation_samples", validation_samples),
            "test": most("test_samples", test_samples),
        }
        self.split_seed = seed("split_seed", split_seed)
        self.normalization = normalization(known, mean, std)
        self.augment = one_of("augment", augment, AUGMENTATIONS)
        self.cache = one_of("cache", cache, CACHES)
        self.workers = integer("workers", workers, 0, 1_000)
        self.label_smoothing = number("label_smoothing", label_smoothing, 0, 0.999)
        self.channels_last = flag("channels_last", channels_last)
        self.model = ModelConfig(
            name=model,
            weights=None if weights is None else text("weights", weights),
            weights_order=flag("weights_order", weights_order),
            classes=0,
            drop_rate=number("drop_rate", drop_rate, 0, 0.999),
            drop_path_rate=number("drop_path_rate", drop_path_rate, 0, 0.999),
            norm_momentum=None
            if norm_momentum is None
            else number("norm_momentum", norm_momentum, 1e-6, 1),
        )
        self.teacher = None
        if teacher is not None:
            self.teacher = ModelConfig(
                name=teacher,
                weights=None
                if teacher_weights is None
                else text("teacher_weights", teacher_weights),
                classes=0,
                key="teacher_weights",
                new_classifier=False,
            )
        self._splits: Mapping[str, ImageSplit | Split] | None = None

    def load_data(self) -> None:
        """List the images, and decode them where `cache` is `memory`; once."""
        if self._splits is not None:
            return
        found = find(self.path, self.wanted, self.format, self.columns)
        validation, test = self.places
        chosen = choose(
            found, validation=validation, test=test, caps=self.caps, seed=self.split_seed
        )
        with torch.random.fork_rng():
            # What is wrong with it is to be said before anything is trained.
            self._teacher(len(found.classes))
        splits: dict[str, ImageSplit | Split] = {**chosen}
        if self.cache == "memory":
            threads = max(1, self.workers)
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
        model = dataclasses.replace(self.model, classes=len(self.classes)).build()
        return self._laid_out(model)

    def build_teacher(self) -> nn.Module | None:
        """The teacher in evaluation mode; None where the float model teaches."""
        self.load_data()
        return self._teacher(len(self.classes))

    def _teacher(self, classes: int) -> nn.Module | None:
        if self.teacher is None:
            return None
        model = dataclasses.replace(self.teacher, classes=classes).build()
        own = normalization(data_config(self.teacher.name), None, None)
        return self._laid_out(Teacher(model, own, self.normalization)).eval()

    def _laid_out(self, model: nn.Module) -> nn.Module:
        if not self.channels_last:
            return model
        return model.to(memory_format=torch.channels_last)

    def example_inputs(self) -> tuple[Tensor]:
        """One image of the training split, shape (1, 3, size, size)."""
        images, _ = next(iter(self._batches("train", 1, None)))
        return (images,)

    def loader(self, split: str, batch_size: int, seed: int | None = None) -> ImageBatches:
        """One epoch; `seed` orders and augments the training split and is unused elsewhere."""
        check_batch_size(batch_size)
        return self._batches(split, batch_size, seed if split == "train" else None, self.workers)

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
        if self.channels_last:
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
