"""Detection of splits and classes, and errors about invalid data."""

from __future__ import annotations

import os
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_images import image_tree

from nipq_search.errors import UserError
from nipq_search.tasks import base, make_task


def task_of(path, **more):
    return make_task(
        "image_folder", {"path": str(path), "model": "test_resnet", "size": 32, **more}
    )


def refused(problem, path, **args):
    with pytest.raises(UserError, match=problem) as error:
        base.load_data(task_of(path, **args))
    assert "\n" not in str(error.value)


def sizes(task):
    return tuple(base.dataset(task)["splits"].values())


@pytest.fixture
def tree(tmp_path):
    return image_tree(tmp_path / "tree", {"train": 3, "val": 2, "test": 1}, classes=2)


@pytest.mark.parametrize("names", [("Train", "Val", "Test"), ("TRAIN", "VALID", "TESTING")])
def test_names_of_splits_are_blind_to_case(tree, names):
    for old, new in zip(("train", "val", "test"), names, strict=True):
        (tree / old).rename(tree / new)
    task = task_of(tree)
    assert sizes(task) == (6, 4, 2)
    assert base.dataset(task)["classes"] == 2
    assert sizes(task_of(tree, validation=names[1].lower(), test=names[1])) == (6, 4, 4)


@pytest.mark.parametrize("name", ["val", "Validation", "dev", "VALID"])
def test_a_split_is_not_a_class(tree, name):
    (tree / "val").rename(tree / name)
    (tree / "train").rename(tree / "pictures")
    refused("is the name of a split, not of a class, and there is no folder 'train'", tree)
    image_tree(tree / "train", {".": 12}, classes=2)
    assert sizes(task_of(tree, validation=0.1, test=0.1))[0] > 3


def test_two_folders_of_one_name_are_refused(tree):
    (tree / "val").rename(tree / "TRAIN")
    refused("'TRAIN' and 'train' differ only in case", tree)


def test_one_class_is_refused(tmp_path):
    refused("one class, 'class 0'; at least two are", image_tree(tmp_path, {".": 20}, classes=1))
    file = tmp_path / "x.parquet"
    images = [path.read_bytes() for path in tmp_path.rglob("*.png")]
    pq.write_table(pa.table({"image": images, "label": [3] * len(images)}), file)
    refused("one class, '3'; at least two are needed", file)


def test_files_of_other_splits_do_not_train(tmp_path):
    image_tree(tmp_path / "png", {".": 20}, classes=1)
    images = [path.read_bytes() for path in sorted(tmp_path.rglob("*.png"))]
    table = pa.table({"image": images, "label": ["a", "b"] * 10})
    for name in ("Validation", "test"):
        pq.write_table(table, tmp_path / f"{name}-0.parquet")
    refused("has files for (test and validation|validation and test), but none", tmp_path)
    pq.write_table(table, tmp_path / "data.parquet")
    assert sizes(task_of(tmp_path)) == (20, 20, 20)


def test_odd_parquet_columns_are_named(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [b"a", b"b"], "label": [[1], [2]]}), file)
    refused(r"task_args.label: column 'label' of .* contains list<.*; labels must be", file)
    columns = [pa.array([b"a"]), pa.array([1]), pa.array([2])]
    pq.write_table(pa.table(columns, names=["image", "label", "label"]), file)
    refused("task_args.label: .* has 2 columns 'label'", file)


@pytest.mark.parametrize("name", ["labels.csv", "notes.txt"])
def test_other_files_are_refused(tmp_path, name):
    (tmp_path / name).write_text("a,b\n")
    refused(f"{name}: give a folder, or a Parquet file", tmp_path / name)


def test_hidden_files_and_circles_of_links_are_left_out(tree):
    (tree / "train" / "class 0" / "._000.png").write_bytes(b"rubbish")
    (tree / "train" / "class 0" / "round").symlink_to(tree / "train")
    (tree / "elsewhere").mkdir()
    (tree / "train" / "class 1").rename(tree / "elsewhere" / "1")
    (tree / "train" / "class 1").symlink_to(tree / "elsewhere" / "1")
    assert sizes(task_of(tree)) == (6, 4, 2)


def test_a_folder_that_may_not_be_read_is_named(tree, monkeypatch):
    shut, scandir = str(tree / "train" / "class 1"), os.scandir

    def guarded(path="."):
        if str(path) == shut:
            raise PermissionError(13, "Permission denied", shut)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    refused("train/class 1: cannot be read: permission denied$", tree)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_large_images_warn_of_nothing(tree, monkeypatch, cache):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(task_of(tree, cache=cache).loader("test", 1))) == 2
