"""Images from folders, Parquet and IDX files: splits, batches and error messages."""

from __future__ import annotations

import gzip
import io
import struct
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_images import image_tree

from nipq_search.errors import UserError
from nipq_search.tasks import base, make_task
from nipq_search.tasks.vision.image_folder.batches import stack_images
from nipq_search.tasks.vision.image_folder.sources import PackedBytes
from nipq_search.tasks.vision.image_folder.transforms import (
    ChannelNormalization,
    Crop,
    random_box,
    shift_image,
)

MODEL = "test_efficientnet"


def task_of(path, **more):
    return make_task("image_folder", {"path": str(path), "model": MODEL, "size": 32, **more})


def sizes(task):
    return tuple(base.dataset(task)["splits"].values())


def batches(task, split="train", seed=3, batch_size=8):
    return list(task.loader(split, batch_size, seed))


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """10, 4 and 3 images of each of 6 classes, in one folder per split."""
    return image_tree(tmp_path_factory.mktemp("tree"), {"train": 10, "val": 4, "test": 3})


def own_tree(tmp_path, **counts):
    return image_tree(tmp_path / "own", counts or {"train": 3, "val": 2, "test": 2}, classes=2)


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(file, "PNG")
    return file.getvalue()


def test_split_folders_are_found_by_their_names(tree):
    task = task_of(tree)
    assert sizes(task) == (60, 24, 18)
    assert task.classes == tuple(f"class {number}" for number in range(6))
    labels = np.concatenate([labels for _, labels in batches(task, "test", batch_size=7)])
    assert np.array_equal(np.bincount(labels), [3] * 6)


def test_a_split_can_be_a_named_folder_or_a_share(tree):
    task = task_of(tree, validation=0.2, test="val")
    assert sizes(task) == (48, 12, 24)
    with pytest.raises(UserError, match="task_args.test: the data contain no split named 'nope'"):
        task_of(tree, test="nope").load_data()


def test_a_tree_without_splits_is_cut_in_shares(tree):
    task = task_of(tree / "train", validation=0.25)
    assert sizes(task) == (39, 15, 6)


def test_validation_is_the_same_whatever_train_samples_says(tree):
    whole = task_of(tree / "train")
    part = task_of(tree / "train", train_samples=12, test_samples=3)
    assert sizes(part) == (12, 6, 3)
    assert same(batches(whole, "validation"), batches(part, "validation"))
    assert np.bincount(part.split("train").labels).tolist() == [2] * 6


def test_files_in_folders_below_a_class_count(tmp_path):
    place = own_tree(tmp_path)
    (place / "train" / "class 0" / "more").mkdir()
    (place / "train" / "class 0" / "more" / "A.PNG").write_bytes(png((1, 2, 3)))
    assert sizes(task_of(place)) == (7, 4, 4)


@pytest.mark.parametrize("augment", ["none", "light", "imagenet"])
def test_batches_are_the_same_however_many_workers(tree, augment):
    tasks = [task_of(tree, cache="none", workers=n, augment=augment) for n in (0, 2)]
    state = torch.get_rng_state()
    alone, workers = (batches(task) for task in tasks)
    assert same(alone, workers) and len(tasks[0].loader("train", 8)) == len(alone) == 8
    assert same(workers, batches(tasks[1])), "the batches are the same a second time"
    assert not same(alone, batches(tasks[0], seed=4))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("augment", ["none", "light"])
def test_the_cache_changes_nothing(tree, augment):
    tasks = [task_of(tree, cache=cache, augment=augment) for cache in ("memory", "none")]
    for split in base.SPLITS:
        assert same(*(batches(task, split) for task in tasks))


@pytest.mark.parametrize("augment", ["light", "imagenet"])
def test_augmentation_is_for_training_alone(tree, augment):
    plain, task = task_of(tree), task_of(tree, augment=augment)
    assert same(batches(plain, "validation"), batches(task, "validation"))
    (one, labels), (other, others) = (batches(t, batch_size=60)[0] for t in (plain, task))
    assert torch.equal(labels, others)
    assert (one != other).flatten(1).any(1).float().mean() > 0.9
    assert same(batches(plain, seed=None), batches(task, seed=None)), (
        "there is no augmentation without a seed"
    )


def test_gray_images_take_a_third_of_the_memory(tmp_path):
    place = own_tree(tmp_path)
    for path in place.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    task = task_of(place)
    assert task.split("train").images.shape == (6, 1, 32, 32)
    images, _ = batches(task)[0]
    assert images.shape == (6, 3, 32, 32)
    next(place.rglob("train/*/*.png")).write_bytes(png((9, 8, 7)))
    assert task_of(place).split("train").images.shape == (6, 3, 32, 32)
    assert same(batches(task_of(place)), batches(task_of(place, cache="none")))


def test_digest_of_files_is_of_their_names(tmp_path):
    place = own_tree(tmp_path)
    digests = [base.dataset(task_of(place, cache=c))["digest"] for c in ("memory", "none")]
    path = next(place.rglob("train/*/*.png"))
    path.write_bytes(png((9, 8, 7)))
    again = [base.dataset(task_of(place, cache=c))["digest"] for c in ("memory", "none")]
    assert digests[0] != again[0] and digests[1] == again[1]
    path.rename(path.with_name("other.png"))
    assert base.dataset(task_of(place, cache="none"))["digest"] != again[1]


# Parquet and IDX


def parquet(path, labels, struct_column=False, **names):
    encoded = [png((index, 0, 0)) for index in range(len(labels))]
    images = [{"bytes": e, "path": "x"} for e in encoded] if struct_column else encoded
    columns = {names.get("image", "image"): images, names.get("label", "label"): labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=5)
    return path


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_parquet_file_is_cut_in_shares(tmp_path, cache):
    path = parquet(tmp_path / "x.parquet", ["b", "a"] * 20, image="img", label="kind")
    task = task_of(path, image="img", label="kind", cache=cache)
    assert sizes(task) == (32, 4, 4)
    assert task.classes == ("a", "b")
    images, labels = next(iter(task.loader("validation", 4)))
    assert len(set(images[:, 0, 0, 0].tolist())) == 4
    assert sorted(labels.tolist()) == [0, 0, 1, 1]


def test_parquet_files_are_splits_by_their_names(tmp_path):
    place = tmp_path / "data"
    parquet(place / "train-00000-of-00002.parquet", [0, 1, 2] * 2, struct_column=True)
    parquet(place / "train-00001-of-00002.parquet", [0, 1, 2], struct_column=True)
    parquet(place / "validation-00000-of-00001.parquet", [2, 1, 0], struct_column=True)
    assert sizes(task_of(tmp_path, test=0.34)) == (6, 3, 3)
    assert sizes(task_of(place, test="validation", validation=0.34)) == (6, 3, 3)


@pytest.mark.parametrize(
    ("labels", "names", "args", "problem"),
    [
        ([0, 1], {}, {"image": "img"}, "task_args.image: .*x.parquet has no column 'img'"),
        ([0, 1], {"label": "y"}, {}, "task_args.label: .* has no column 'label'"),
        ([0, 1], {}, {"image": "label"}, "task_args.label: names the same column"),
        ([-1, -1], {}, {}, "has label -1: labels are missing"),
        (
            [0.5, 1.0],
            {},
            {},
            "label: column 'label' of .* contains double; labels must be integers",
        ),
        ([0, None], {}, {}, "task_args.label: .* has rows without a value"),
        ([], {}, {}, "contains no images"),
    ],
)
def test_bad_parquet_files_are_named(tmp_path, labels, names, args, problem):
    path = parquet(tmp_path / "x.parquet", labels, **names)
    refused(problem, path, **args)


def test_a_column_without_images_is_named(tmp_path):
    pq.write_table(pa.table({"image": [1, 2], "label": [0, 1]}), tmp_path / "x.parquet")
    refused("task_args.image: column 'image' of .* contains int64, not the bytes", tmp_path)


def test_files_that_are_not_parquet_are_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    refused("x.parquet: cannot be read as Parquet", tmp_path)
    refused("no Parquet files", own_tree(tmp_path), format="parquet")


def idx_folder(tmp_path, test_labels=(0, 1, 2)):
    for part, labels in [("train", np.arange(30) % 3), ("t10k", np.array(test_labels))]:
        images = np.random.RandomState(len(labels)).randint(0, 256, (len(labels), 28, 28))
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            data = gzip.compress(header + array.astype(np.uint8).tobytes())
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(data)
    return tmp_path


def test_idx_files_are_read(tmp_path):
    task = task_of(idx_folder(tmp_path))
    assert sizes(task) == (27, 3, 3)
    assert task.split("train").images.shape == (27, 1, 32, 32)
    assert sizes(task_of(tmp_path, validation=0.2, test=0.2, cache="none")) == (18, 6, 6)
    assert same(batches(task_of(tmp_path)), batches(task_of(tmp_path, cache="none")))


def test_idx_files_that_do_not_fit_are_named(tmp_path):
    refused("test: lacks class '2'", idx_folder(tmp_path, [0, 1, 1]))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    refused("t10k-labels-idx1-ubyte: no such file", tmp_path)


# Bad input


def refused(problem, path, **args):
    """Assert that loading raises an error with this text, on a single line."""
    with pytest.raises(UserError, match=problem) as error:
        task_of(path, **args).load_data()
    assert "\n" not in str(error.value)


def test_bad_trees_are_named(tmp_path):
    refused("no such file or folder", tmp_path / "nowhere")
    refused("no class folders", tmp_path)
    place = own_tree(tmp_path)
    (place / "train" / "empty").mkdir()
    refused("train/empty: no images in this class folder", place)
    (place / "train" / "empty").rename(place / "val" / "empty")
    refused("val/empty: no images in this class folder", place)
    (place / "val" / "empty" / "0.png").write_bytes(png(0))
    refused("val: has class 'empty', which the training images lack", place)
    (place / "val" / "empty").rename(place / "val" / ".hidden")
    (place / "val" / "class 1").rename(place / "val" / "class 2")
    refused("val: lacks class 'class 1' and has class 'class 2'", place)


@pytest.mark.parametrize("data", [b"", b"nothing", png((1, 2, 3))[:60]])
def test_an_unreadable_image_is_named(tmp_path, data):
    place = own_tree(tmp_path)
    (place / "train" / "class 1" / "bad.png").write_bytes(data)
    refused("class 1/bad.png: not a readable image", place)
    for workers in (0, 1):
        task = task_of(place, cache="none", workers=workers)
        with pytest.raises(UserError, match="class 1/bad.png: not a readable image") as error:
            batches(task)
        assert "\n" not in str(error.value)
    (place / "train" / "class 1" / "bad.png").unlink()
    with pytest.raises(UserError, match="class 1/bad.png: cannot be read"):
        batches(task)


def test_images_that_do_not_fit_into_memory_are_refused(tree, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 300)
    refused("cache: 60 decoded images take 0 GB.*; use cache: none", tree)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"model": "resnet_18"}, r"model: timm has no model named .*did you mean 'resnet\w+'"),
        ({"teacher": "qqqq"}, "task_args.teacher: timm has no model named 'qqqq'$"),
        ({"cache": "disk"}, "task_args.cache: 'disk' is unknown"),
        ({"augment": "lights"}, r"task_args.augment: .*did you mean 'light'"),
        ({"format": "tar"}, "task_args.format: 'tar' is unknown"),
        ({"interpolation": "cubic"}, "did you mean 'bicubic'"),
        ({"size": 0}, "task_args.size: 0 is not an integer from 8"),
        ({"size": "big"}, "task_args.size: 'big' is not an integer"),
        ({"crop_pct": 1.5}, "task_args.crop_pct"),
        ({"validation": 1.5}, "task_args.validation: 1.5 is not a share"),
        ({"test": True}, "task_args.test: True is not a share"),
        ({"label_smoothing": 1}, "task_args.label_smoothing"),
        ({"mean": [0.5, 0.5]}, "task_args.mean: give one number, or one for each of 3"),
        ({"mean": "gray"}, "task_args.mean: give one number, or one for each of 3"),
        ({"std": 0}, "task_args.std: must be greater than 0"),
        ({"std": float("nan")}, "task_args.std: give one number"),
        ({"size": 4}, "task_args.size: 4 is not an integer from 8"),
        ({"train_samples": "ten"}, "task_args.train_samples: 'ten' is not a positive integer"),
        ({"test_samples": 2.5}, "task_args.test_samples: 2.5 is not a positive integer"),
        ({"split_seed": "x"}, "task_args.split_seed: 'x' is not an integer"),
        ({"image": 3}, "task_args.image: 3 is not a non-empty string"),
        ({"label": ["a"]}, r"task_args.label: \['a'\] is not a non-empty string"),
        ({"channels_last": "yes"}, "task_args.channels_last: 'yes' is neither true nor false"),
        ({"weights_order": 1}, "task_args.weights_order: 1 is neither true nor false"),
        ({"weights": 3}, "task_args.weights: 3 is not a non-empty string"),
        ({"model": 18}, "task_args.model: 18 is not a non-empty string"),
        ({"workers": 1.5}, "task_args.workers: 1.5 is not an integer"),
        ({"validation": ["val"]}, r"task_args.validation: \['val'\] is not a share"),
        (
            {"model": "test_vit"},
            "task_args.size: test_vit accepts only .* of 160 .* size: 160",
        ),
        (
            {"teacher": "test_vit"},
            "task_args.size: test_vit accepts only .* of 160 .* size: 160",
        ),
        ({"train_samples": 0}, "task_args.train_samples: 0 is not a positive integer"),
        ({"test_samples": 19}, "task_args.test_samples: 19 exceeds the 18"),
        ({"validation": 0.5, "test": 0.5}, "none are left for training"),
    ],
)
def test_impossible_arguments_are_named(tree, args, problem):
    refused(problem, tree, **args)


@pytest.mark.parametrize("module", ["timm", "PIL", "torchmetrics"])
def test_a_missing_library_says_how_to_install(tree, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    refused(r"pip install 'nipq-search\[vision\]'", tree)


# Pure functions


def test_packed_bytes_come_back():
    items = [b"", b"abc", b"", b"\x00\xff"]
    packed = PackedBytes.of(items)
    assert [packed[index] for index in range(len(packed))] == items


def test_random_boxes_lie_inside_and_have_the_asked_shape():
    generator = torch.Generator().manual_seed(0)
    areas = []
    for width, height in [(40, 30)] * 200 + [(3, 400), (400, 3), (1, 1)]:
        left, top, right, bottom = random_box(width, height, generator)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        if width == 40:
            areas.append((right - left) * (bottom - top) / 1200)
            assert 0.6 < (right - left) / (bottom - top) < 1.7
    assert min(areas) < 0.2 and max(areas) > 0.8


def test_displacement_moves_the_whole_image():
    image = np.arange(1, 13, dtype=np.uint8).reshape(1, 3, 4)
    assert shift_image(image, 1, 0)[0].tolist() == [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11]]
    assert shift_image(image, 0, -2)[0].tolist() == [[9, 10, 11, 12], [0] * 4, [0] * 4]
    assert np.array_equal(shift_image(image, 0, 0), image)


@pytest.mark.parametrize("side", [(40, 64), (65, 33), (20, 20), (100, 37)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_crops_as_timm_does(side, interpolation):
    from timm.data import create_transform

    pixels = np.random.RandomState(0).randint(0, 256, (*side, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = create_transform(32, mean=mean, std=std, interpolation=interpolation, crop_pct=0.875)(
        image
    )
    ours = np.asarray(Crop(size=32, share=0.875, interpolation=interpolation).center(image))
    raw = torch.from_numpy(ours.copy()).permute(2, 0, 1)[None]
    assert torch.allclose(ChannelNormalization(mean=mean, std=std)(raw)[0], theirs, atol=1e-6)


def test_gray_images_among_colored_ones():
    gray, colored = np.ones((1, 2, 2), np.uint8), np.zeros((3, 2, 2), np.uint8)
    assert stack_images([gray, gray]).shape == (2, 1, 2, 2)
    assert stack_images([gray, colored]).tolist() == [
        np.ones((3, 2, 2)).tolist(),
        colored.tolist(),
    ]
