"""The argument section that locates the images and divides them into splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nipq_search.tasks.common.arguments import (
    integer,
    non_empty_string,
    one_of,
    sample_limit,
    seed,
)
from nipq_search.tasks.common.package_files import resolve_path
from nipq_search.tasks.common.sections import store
from nipq_search.tasks.vision.image_folder.search import find_images
from nipq_search.tasks.vision.image_folder.sources import FoundImages
from nipq_search.tasks.vision.image_folder.splits import (
    ImageSplit,
    ImageSplitSource,
    choose_images,
    split_names,
)

FORMATS = ("folder", "parquet", "idx")
CACHES = ("memory", "none")


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Location and format of the images, their splits, and how they are read.

    Attributes:
        path: folder with `train`, `val` and `test` folders of class folders, or with class folders
            only; a Parquet file or a folder of Parquet files; or a folder of IDX files. The path
            is made absolute, and `package://NAME/FOLDER` is resolved.
        format: `folder`, `parquet` or `idx`; None detects the format.
        image: name of the Parquet column with the images: bytes, or a struct with `bytes`.
        label: name of the Parquet column with the labels: integers or text.
        validation: name of the validation folder, or the share of the training images to hold
            out. None searches for a folder with a usual name and, if there is none, holds out a
            tenth.
        test: the same for the test split.
        train_samples: maximum number of training images; None uses all.
        validation_samples: maximum number of validation images; None uses all.
        test_samples: maximum number of test images; None uses all.
        split_seed: seed for drawing held-out shares, and for selecting images up to a maximum.
        cache: `memory` keeps the decoded images in memory; `none` decodes every image in each
            epoch.
        workers: without a cache, the number of processes that read and decode images; otherwise,
            the number of threads that fill the cache.
    """

    path: str
    format: str | None = None
    image: str = "image"
    label: str = "label"
    validation: ImageSplitSource = None
    test: ImageSplitSource = None
    train_samples: int | None = None
    validation_samples: int | None = None
    test_samples: int | None = None
    split_seed: int = 0
    cache: str = "memory"
    workers: int = 0

    def __post_init__(self) -> None:
        """Check every argument and make `path` absolute."""
        if self.format is not None:
            one_of("format", self.format, FORMATS)
        split_names(self.validation, self.test)
        for split, limit in self.limits().items():
            sample_limit(f"{split}_samples", limit)
        non_empty_string("image", self.image)
        non_empty_string("label", self.label)
        seed("split_seed", self.split_seed)
        one_of("cache", self.cache, CACHES)
        integer("workers", self.workers, 0, 1_000)
        store(self, path=str(resolve_path(self.path, "task_args.path")))

    def limits(self) -> dict[str, int | None]:
        """Return the maximum number of images by split; None means no limit."""
        return {
            "train": self.train_samples,
            "validation": self.validation_samples,
            "test": self.test_samples,
        }

    def find(self) -> FoundImages:
        """Return the images at `path` without decoding them.

        Raises:
            UserError: the data are missing or inconsistent.
        """
        names = split_names(self.validation, self.test)
        return find_images(Path(self.path), names, self.format, (self.image, self.label))

    def choose(self, found: FoundImages) -> dict[str, ImageSplit]:
        """Divide the images that `find` returned into the three splits.

        Raises:
            UserError: a named folder is missing, or a limit exceeds the number of images.
        """
        return choose_images(
            found,
            validation=self.validation,
            test=self.test,
            limits=self.limits(),
            seed=self.split_seed,
        )
