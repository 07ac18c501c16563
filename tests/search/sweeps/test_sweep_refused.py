"""Rejected starts: one line that names the fix, exit code 2, and no process or file is left."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_helpers import write_sweep

from nipq_search.cli import main

Refused = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Refused:
    """A function that runs the sweep file with arguments and returns the one-line refusal.

    Nothing may have changed in the folder, and Ray must not have been started.
    """

    def started(*args: Any) -> None:
        raise AssertionError("Ray was started")

    def run(*arguments: str) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        code = main(["run", "sweep.yaml", "--out", "out", *arguments])
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert code == 2 and after == before
        stdout, stderr = capfd.readouterr()
        assert stdout == ""
        (line,) = stderr.splitlines()
        assert line.startswith("error: ")
        return line

    monkeypatch.chdir(tmp_path)
    for name in ("NIPQ_STORAGE_URL", "NIPQ_STORAGE_URL_FILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("nipq_search.search.run.ray_cluster", started)
    return run


def test_a_budget_below_the_least_cost_is_refused(tmp_path: Path, refused: Refused) -> None:
    write_sweep(tmp_path, budgets=[{"bops": "uniform 4"}, {"bops": 20_000}])
    line = refused()
    assert "{bops: 20000}" in line and "least" in line
    assert "stem" in line  # a layer that sets the least cost
    assert not (tmp_path / "out").exists()


def test_missing_data_are_refused_with_the_way_to_get_them(
    tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "empty").mkdir()
    write_sweep(tmp_path, task="fashion_mnist", task_args={"path": "empty"})
    line = refused()
    assert "empty" in line and "dataset-fashion-mnist" in line
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path, refused: Refused) -> None:
    write_sweep(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    line = refused()
    assert "not a sweep" in line and "thesis.tex" in line


def test_a_misspelt_key_is_refused_with_the_right_one(tmp_path: Path, refused: Refused) -> None:
    write_sweep(tmp_path)
    line = refused("--set", "train.epoch=3")
    assert "train.epoch" in line and "'epochs'" in line
    assert not (tmp_path / "out").exists()


def test_an_address_where_nothing_listens_is_refused_at_once(
    tmp_path: Path, refused: Refused
) -> None:
    write_sweep(tmp_path)
    with socket.socket() as bound:  # the port is taken, but no server listens on it
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        line = refused("--address", address)
    assert f"--address {address}: no Ray cluster is reachable there" in line
    assert "`ray start --head`" in line
    assert not (tmp_path / "out").exists()


def test_a_storage_that_does_not_answer_is_refused_without_its_password(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(tmp_path)
    url = "postgresql://user:s3cr3t-word@127.0.0.1:1/x"
    monkeypatch.setenv("NIPQ_STORAGE_URL", url)
    line = refused()
    assert "NIPQ_STORAGE_URL" in line and "s3cr3t" not in line
    assert not (tmp_path / "out").exists()
