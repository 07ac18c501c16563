"""Paths inside installed packages, and messages about missing files."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from nipq_search.errors import UserError
from nipq_search.tasks.base import load_data
from nipq_search.tasks.common.package_files import list_files, resolve_file, resolve_path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a data file; importing the package would raise an error."""
    folder = tmp_path / "own_data_package"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "data" / "table.csv").write_text("a,b\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_file_in_a_package_is_found_without_importing_it(package):
    wanted = package / "data" / "table.csv"
    assert resolve_file("package://own_data_package/data/table.csv", "path") == wanted
    assert resolve_path("package://own_data_package[own-data==1.0]/data", "path") == wanted.parent
    assert "own_data_package" not in sys.modules


def test_plain_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path("~/x", "path") == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    assert resolve_path("a/b", "path") == tmp_path / "a" / "b"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("package://own_data_package/data/tabel.csv", r"has no .* \(did you mean 'table.csv'\?\)"),
        ("package://own_data_package/date/t", "has no 'date/t'; the folder .* does not exist"),
        ("package://own_absent_package/x", "pip install own-absent-package$"),
        ("package://own_absent_package[own-data==1.0]/x", "pip install own-data==1.0$"),
        ("package://own_data_package/../x", "is not of the form package://NAME/FILE"),
        ("package://own_data_package", "is not of the form package://NAME/FILE"),
        ("package://json.tool/x", "is not of the form"),
        ("package://pickle/x", "is a single module"),
        ("", "is not a path"),
        (3, "3 is not a path"),
    ],
)
def test_errors_are_reported_in_one_line(package, path, problem):
    with pytest.raises(UserError, match=problem) as error:
        resolve_path(path, "task_args.path")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("task_args.path: ")


def test_the_nearest_file_is_named(tmp_path):
    (tmp_path / "train.csv").touch()
    with pytest.raises(UserError, match=r"no file .*/tran.csv \(did you mean 'train.csv'\?\)"):
        resolve_file(str(tmp_path / "tran.csv"), "task_args.path")
    with pytest.raises(UserError, match="is a folder"):
        resolve_file(str(tmp_path), "task_args.path")


def test_files_below_a_folder_without_hidden_ones(tmp_path, monkeypatch):
    for name in ("b/c", "a", ".x", ".git/y", "b/.z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "round").symlink_to(tmp_path)
    assert list_files(tmp_path) == [tmp_path / "a", tmp_path / "b" / "c"]
    shut, scandir = str(tmp_path / "b"), os.scandir

    def guarded(path="."):
        if str(path) == shut:
            raise PermissionError(13, "Permission denied", shut)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match=f"{shut}: cannot be read: permission denied"):
        load_data(SimpleNamespace(load_data=lambda: list_files(tmp_path)))
