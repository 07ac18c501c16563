"""Valid and damaged IDX files, and the Fashion-MNIST folder."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from nipq_search.errors import UserError
from nipq_search.tasks import make_task
from nipq_search.tasks.vision.fashion_mnist import VARIABLE, FashionMnist
from nipq_search.tasks.vision.idx import read_idx


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of 120 training and 20 test images, the latter in uncompressed files."""
    monkeypatch.setattr(FashionMnist, "validation_samples", 20)
    for part, count in [("train", 120), ("t10k", 20)]:
        images = np.random.RandomState(count).randint(0, 256, (count, 28, 28))
        files = {
            f"{part}-images-idx3-ubyte": idx(images),
            f"{part}-labels-idx1-ubyte": idx(np.arange(count) % 10),
        }
        for name, data in files.items():
            if part == "train":
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (tmp_path / name).write_bytes(data)
    return tmp_path


def test_plain_and_compressed_files_read_alike(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    plain, compressed = tmp_path / "a", tmp_path / "a.gz"
    plain.write_bytes(idx(array))
    compressed.write_bytes(gzip.compress(idx(array)))
    assert np.array_equal(read_idx(plain, 3), array)
    assert np.array_equal(read_idx(compressed, 3), array)


WHOLE = idx(np.zeros((2, 3, 4)))


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a", b"", "starts with nothing"),
        ("a", b"\x00\x00\x09\x03" + WHOLE[4:], "starts with 00000903"),
        ("a", idx(np.zeros((2, 3))), "starts with 00000802"),
        ("a", WHOLE[:10], "ends within its header"),
        ("a", WHOLE[:-1], "has 39 bytes, but its header specifies 40"),
        ("a", WHOLE + b"\x00", "has 41 bytes"),
        ("a.gz", gzip.compress(WHOLE, mtime=0)[:-9], "cannot be read"),
        ("a.gz", WHOLE, "cannot be read"),
        ("a.gz", gzip.compress(WHOLE, mtime=0)[:12] + b"\xff" * 20, "cannot be read"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, name, data, problem):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_idx(path, 3)
    assert str(path) in str(error.value) and problem in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_is_split(folder):
    task = make_task("fashion_mnist", {"path": str(folder)})
    assert task.dataset()["splits"] == {"train": 100, "validation": 20, "test": 20}
    assert task.split("test").images.shape == (20, 1, 28, 28)


def test_train_samples_take_a_part_and_keep_validation(folder):
    whole = make_task("fashion_mnist", {"path": str(folder)})
    part = make_task("fashion_mnist", {"path": str(folder), "train_samples": 30})
    assert np.array_equal(part.split("train").images, whole.split("train").images[:30])
    assert np.array_equal(part.split("validation").images, whole.split("validation").images)


def test_augmentation_is_a_function_of_the_seed(folder):
    plain = make_task("fashion_mnist", {"path": str(folder)})
    task = make_task("fashion_mnist", {"path": str(folder), "augment": True})
    (one, labels), (again, _) = (next(iter(task.loader("train", 50, 1))) for _ in range(2))
    unmoved, same_labels = next(iter(plain.loader("train", 50, 1)))
    assert (one == again).all() and not (one == unmoved).all()
    assert (labels == same_labels).all()
    validation = (next(iter(t.loader("validation", 20, 1)))[0] for t in (task, plain))
    assert (next(validation) == next(validation)).all()


def test_environment_names_the_folder(folder, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(folder))
    assert make_task("fashion_mnist").dataset()["splits"]["train"] == 100


def test_missing_folder_says_how_to_install(tmp_path):
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist") as error:
        make_task("fashion_mnist", {"path": str(tmp_path / "none")}).load_data()
    assert "task_args: {path:" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_named(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte: no Fashion-MNIST"):
        make_task("fashion_mnist", {"path": str(folder)}).load_data()


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(np.zeros(19), "19 labels for 20 images"), (np.full(20, 10), "has label 10")],
)
def test_labels_that_do_not_fit_are_named(folder, labels, problem):
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(UserError, match=problem):
        make_task("fashion_mnist", {"path": str(folder)}).load_data()


@pytest.mark.parametrize("count", [0, 101])
def test_impossible_train_samples_are_named(folder, count):
    with pytest.raises(UserError, match="task_args.train_samples"):
        make_task("fashion_mnist", {"path": str(folder), "train_samples": count}).load_data()
