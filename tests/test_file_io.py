"""Atomic writes, sealed files, network file systems and settings from files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nipq_search import file_io
from nipq_search.errors import UserError
from nipq_search.search.checks.preflight import check_databases, check_folder
from nipq_search.search.study.database_lease import make_engine
from nipq_search.search.study.storage import storage_url
from nipq_search.tracking.server import environment_uri


def test_a_written_file_is_whole_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "file.json"
    file_io.write_json(path, {"a": [1, 2.5, None]})
    assert file_io.read_json(path) == {"a": [1, 2.5, None]}
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failed_write_keeps_the_old_file_and_no_other(step, tmp_path, monkeypatch):
    path = tmp_path / "file"
    file_io.write_bytes(path, b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, step, full)
        file_io.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("refusal", [None, errno.EPERM, errno.EOPNOTSUPP])
def test_the_first_of_several_writers_wins(refusal, tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(refusal, os.strerror(refusal))

    if refusal is not None:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "new" / "file"
    assert file_io.write_once(path, b"one")
    assert not file_io.write_once(path, b"two")
    assert path.read_bytes() == b"one" and path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["file"]


def test_a_link_whose_reply_was_lost_counts_as_created(tmp_path, monkeypatch):
    """An NFS client repeats a request whose reply was lost; the name then exists already."""
    link = os.link

    def twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert file_io.write_once(tmp_path / "file", b"one")


def test_a_full_disk_is_not_a_lost_race(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space"):
        file_io.write_once(tmp_path / "file", b"one")
    assert os.listdir(tmp_path) == []


def test_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError):
        file_io.write_json(tmp_path / "file", {"a": float("nan")})
    with pytest.raises(ValueError):
        file_io.write_sealed(tmp_path / "file", {"a": float("inf")})
    assert os.listdir(tmp_path) == []


def test_missing_and_incomplete_json_is_none(tmp_path):
    assert file_io.read_json(tmp_path / "none") is None
    (tmp_path / "torn").write_bytes(b'{"a": \xff')
    assert file_io.read_json(tmp_path / "torn") is None
    assert file_io.read_json(tmp_path) is None


def test_a_seal_holds_and_breaks(tmp_path):
    path = tmp_path / "record.json"
    file_io.write_sealed(path, {"b": 1, "a": {"c": [0.1]}})
    assert file_io.read_sealed(path) == {"b": 1, "a": {"c": [0.1]}}
    whole = path.read_text()
    for broken in (whole.replace("0.1", "0.2"), whole.replace("sha256", "sha"), whole[:-9], "[]"):
        path.write_text(broken)
        assert file_io.read_sealed(path) is None
    assert file_io.read_sealed(tmp_path / "none") is None


def test_canonical_bytes_do_not_depend_on_order():
    assert file_io.canonical({"a": 1, "b": 2}) == file_io.canonical({"b": 2, "a": 1})
    assert file_io.digest(b"") == (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


MOUNTS = """\
rootfs / rootfs rw 0 0
/dev/vda1 / ext4 rw 0 0
server:/export /mnt/shared nfs4 rw 0 0
/dev/vdb1 /mnt/shared/local\\040disk xfs rw 0 0
me@host:/x /home/me/far fuse.sshfs rw 0 0
"""


def test_network_file_systems_are_detected_from_mounts(tmp_path, monkeypatch):
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(file_io, "_MOUNTS", tmp_path / "mounts")
    kinds = {
        "/runs/digits": None,
        "/mnt/shared/runs": "nfs4",
        "/mnt/shared": "nfs4",
        "/mnt/shared/local disk/runs": None,
        "/home/me/far/away": "fuse.sshfs",
        "/home/me/farther": None,
    }
    assert {p: file_io.network_file_system_type(Path(p)) for p in kinds} == kinds
    monkeypatch.setattr(file_io, "_MOUNTS", tmp_path / "absent")
    assert file_io.network_file_system_type(Path("/mnt/shared")) is None


def test_sqlite_on_a_network_file_system_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(file_io, "network_file_system_type", lambda path: "nfs")
    for name in ("NIPQ_STORAGE_URL", "NIPQ_STORAGE_URL_FILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="mlflow.db: SQLite on .* set MLFLOW_TRACKING_URI"):
        check_databases(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    check_databases(tmp_path)
    monkeypatch.setenv("NIPQ_STORAGE_URL", f"sqlite:///{tmp_path}/study.db")
    with pytest.raises(UserError, match="study.db: SQLite on .* set NIPQ_STORAGE_URL"):
        check_databases(tmp_path)
    monkeypatch.setenv("NIPQ_STORAGE_URL", f"sqlite+pysqlite:///{tmp_path}/study.db?timeout=9")
    with pytest.raises(UserError, match="study.db: SQLite on .* set NIPQ_STORAGE_URL"):
        check_databases(tmp_path)
    monkeypatch.delenv("NIPQ_STORAGE_URL")
    (tmp_path / "study.db").touch()
    with pytest.raises(UserError, match="study.db"):
        check_databases(tmp_path)


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite+pysqlite://"]
)
def test_a_study_in_memory_is_refused(url, tmp_path, monkeypatch):
    monkeypatch.setenv("NIPQ_STORAGE_URL", url)
    with pytest.raises(UserError, match="NIPQ_STORAGE_URL.*in-memory database"):
        check_databases(tmp_path)


@pytest.mark.parametrize("name", ["NIPQ_STORAGE_URL", "MLFLOW_TRACKING_URI"])
def test_urls_come_from_the_environment_or_from_files(name, tmp_path, monkeypatch):
    read = {"NIPQ_STORAGE_URL": storage_url, "MLFLOW_TRACKING_URI": environment_uri}[name]
    for variable in (name, f"{name}_FILE"):
        monkeypatch.delenv(variable, raising=False)
    assert read() is None
    file = tmp_path / "url"
    monkeypatch.setenv(f"{name}_FILE", str(file))
    for content, problem in (
        (None, "No such file"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "not a text file"),
    ):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}_FILE: .*url.*{problem}"):
            read()
    file.write_text("postgresql://u:p@host/db\n")
    assert read() == "postgresql://u:p@host/db"
    monkeypatch.setenv(name, "http://first")
    assert read() == "http://first"


def test_a_folder_with_interrupted_first_writes_is_accepted(tmp_path):
    """With the study on a server, the folder contains nothing else yet."""
    (tmp_path / "driver.lock").touch()
    for name in (".facts.json.x8_1", ".sweep.yaml.ab"):
        (tmp_path / name).write_text("{")
    check_folder(tmp_path, "tiny")
    (tmp_path / ".facts").touch()
    with pytest.raises(UserError, match="not empty and not a sweep"):
        check_folder(tmp_path, "tiny")


def test_an_invalid_port_is_refused_without_quoting_it():
    """The text may be part of a password with a character that is invalid in a URL."""
    url = "postgresql+psycopg://somebody:open@secret:word/db"
    with pytest.raises(UserError, match="NIPQ_STORAGE_URL: not a database URL") as refused:
        make_engine(url)
    assert "secret" not in str(refused.value) and "word/" not in str(refused.value)
