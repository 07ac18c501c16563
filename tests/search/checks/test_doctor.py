"""`doctor` reports how quantizers are executed; a missing compiler is not an error."""

from __future__ import annotations

import pytest

from nipq_search.quant.kernels import build
from nipq_search.search.checks.doctor import doctor


def kernels():
    (found,) = (check for check in doctor() if check["check"] == "kernels")
    return found


@pytest.fixture(autouse=True)
def fresh():
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def test_kernels_that_are_built():
    assert kernels()["detail"] == "the quantizers' C library is built"


def test_kernels_that_cannot_be_built(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_compiler", lambda: "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    found = kernels()
    assert found["ok"] and "no-such-compiler" in found["detail"]
    assert "Install a C compiler (cc, gcc or clang)" in found["detail"]


def test_kernels_that_are_switched_off(monkeypatch):
    monkeypatch.setenv("NIPQ_SEARCH_KERNELS", "eager")
    assert kernels()["detail"] == "torch operations, because NIPQ_SEARCH_KERNELS is set"
    monkeypatch.setenv("NIPQ_SEARCH_KERNELS", "on")
    found = kernels()
    assert not found["ok"] and "unknown value 'on'" in found["fix"]
