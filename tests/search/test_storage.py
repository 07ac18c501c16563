"""Files that are whole or absent."""

from __future__ import annotations

import os

import pytest

from nipq_search import storage


def test_a_written_file_is_whole_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "file.json"
    storage.write_json(path, {"a": [1, 2.5, None]})
    assert storage.read_json(path) == {"a": [1, 2.5, None]}
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_write_that_fails_leaves_the_old_file_and_no_litter(step, tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write_bytes(path, b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, step, full)
        storage.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError):
        storage.write_json(tmp_path / "file", {"a": float("nan")})
    with pytest.raises(ValueError):
        storage.write_sealed(tmp_path / "file", {"a": float("inf")})
    assert os.listdir(tmp_path) == []


def test_missing_and_torn_json_is_nothing(tmp_path):
    assert storage.read_json(tmp_path / "none") is None
    (tmp_path / "torn").write_bytes(b'{"a": \xff')
    assert storage.read_json(tmp_path / "torn") is None
    assert storage.read_json(tmp_path) is None


def test_a_seal_holds_and_breaks(tmp_path):
    path = tmp_path / "record.json"
    storage.write_sealed(path, {"b": 1, "a": {"c": [0.1]}})
    assert storage.read_sealed(path) == {"b": 1, "a": {"c": [0.1]}}
    whole = path.read_text()
    for broken in (whole.replace("0.1", "0.2"), whole.replace("sha256", "sha"), whole[:-9], "[]"):
        path.write_text(broken)
        assert storage.read_sealed(path) is None
    assert storage.read_sealed(tmp_path / "none") is None


def test_canonical_bytes_do_not_depend_on_order():
    assert storage.canonical({"a": 1, "b": 2}) == storage.canonical({"b": 2, "a": 1})
    assert storage.digest(b"") == (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )
