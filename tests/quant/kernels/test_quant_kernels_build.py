"""Compilation of the C kernels: once per machine, with a warning if it fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "search"))

from sweep_helpers import Command  # noqa: E402

from nipq_search.errors import UserError
from nipq_search.quant.kernels import build


@pytest.fixture
def run_apart(tmp_path_factory):
    """A function that runs Python code in a new process; the library is loaded once per process.

    The process is forked from one that has imported torch, but has not loaded the library.
    """

    def run(code, **environment):
        script = tmp_path_factory.mktemp("apart") / "code.py"
        script.write_text(code)
        return Command(script.parent, **environment)(script=script)

    return run


USE = """
import torch
from nipq_search.quant import prepare, QuantConfig
from nipq_search.quant.kernels import build
torch.manual_seed(0)
model = prepare(torch.nn.Linear(64, 8), torch.randn(16, 64), QuantConfig())
for _ in range(2):
    out = model(torch.ones(16, 64) / 3)
print(build.library() is not None, out.detach().double().sum().item())
"""


def test_a_machine_without_a_compiler_warns_once_and_computes_the_same(tmp_path, run_apart):
    fast = run_apart(USE, XDG_CACHE_HOME=str(tmp_path))
    assert fast.stdout.startswith("True") and not fast.stderr
    assert [path.suffix for path in (tmp_path / "nipq-search").iterdir()] == [".so"]
    none = run_apart(
        USE, XDG_CACHE_HOME=str(tmp_path / "new"), TMPDIR=str(tmp_path), PATH=str(tmp_path), CC=""
    )
    assert none.stderr.count("run without their fast kernels") == 1
    asked = run_apart(USE, NIPQ_SEARCH_KERNELS="eager")
    assert not asked.stderr
    for slow in (none, asked):
        assert slow.stdout.startswith("False")
        assert float(slow.stdout.split()[1]) == pytest.approx(
            float(fast.stdout.split()[1]), abs=1e-5
        )


def test_a_library_that_was_cut_short_is_built_anew(tmp_path, run_apart):
    assert run_apart(USE, XDG_CACHE_HOME=str(tmp_path)).stdout.startswith("True")
    (library,) = tmp_path.glob("nipq-search/*.so")
    for size in (3000, 0):
        os.truncate(library, size)
        done = run_apart(USE, XDG_CACHE_HOME=str(tmp_path))
        assert done.stdout.startswith("True") and not done.stderr
        assert library.stat().st_size > 3000


def test_a_user_without_a_home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.Path, "home", no_home)
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    assert [folder.parent for folder in build._folders()] == [tmp_path]


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_compiler_that_fails_is_named(tmp_path, run_apart):
    broken = tmp_path / "cc"
    broken.write_bytes(b"#!/bin/sh\necho 'no space left \xff' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = run_apart(USE, XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path), CC=str(broken))
    assert "no space left" in done.stderr and done.stdout.startswith("False")
    assert not list(tmp_path.glob("nipq-search/*"))


def test_a_cache_that_cannot_be_written(tmp_path, run_apart):
    (tmp_path / "file").write_text("")
    done = run_apart(USE, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.stdout.startswith("True")


def test_the_source_is_part_of_the_package():
    assert all(source.exists() for source in build.SOURCES)


def test_a_cache_that_does_not_execute(tmp_path, monkeypatch):
    """On a `noexec` mount, the next folder is used."""
    loaded = build.ctypes.CDLL
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))

    def refuse(path):
        if "/cache/" in path:
            raise OSError("failed to map segment from shared object")
        return loaded(path)

    monkeypatch.setattr(build.ctypes, "CDLL", refuse)
    assert str(tmp_path / "nipq-search-") in build._load()._name


def test_a_value_that_means_nothing(monkeypatch):
    monkeypatch.setenv("NIPQ_SEARCH_KERNELS", "egaer")
    with pytest.raises(UserError, match="NIPQ_SEARCH_KERNELS: unknown value 'egaer'; use eager"):
        build.switched_off()
