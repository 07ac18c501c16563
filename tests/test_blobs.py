"""Large files in object stores: atomic replacement and detection of damage."""

from __future__ import annotations

import pytest

from nipq_search import blobs, file_io
from nipq_search.errors import UserError


@pytest.fixture(params=["folder", "file", "s3"])
def home(request, tmp_path):
    """None, a file URI and an S3 URI."""
    if request.param == "s3":
        return request.getfixturevalue("s3").home
    return None if request.param == "folder" else (tmp_path / "else where").as_uri()


def test_written_content_is_read_back(tmp_path, home):
    path = tmp_path / "sweep/model.pt"
    assert not blobs.exists(path) and blobs.digest_of(path) is None
    for data in (b"first", b"second" * 1000):
        blobs.write(path, data, blobs.object_uri(home, "a name", "trials", "3"))
        assert blobs.exists(path) and blobs.read(path) == data
        assert blobs.digest_of(path) == file_io.digest(data)
        assert blobs.size_of(path) == len(data)
    assert path.exists() == (home is None)
    assert len(list(path.parent.iterdir())) == 1
    blobs.remove(path)
    assert not blobs.exists(path) and not list(path.parent.iterdir())
    with pytest.raises(FileNotFoundError):
        blobs.read(path)


def test_objects_are_removed_with_their_pointers(tmp_path, s3):
    path = tmp_path / "checkpoints/000000001/state.pt"
    for data in (b"one", b"two"):
        blobs.write(path, data, s3.home)
    (key,) = s3.objects()
    assert key.startswith("some sweeps/state.pt-"), "the first object is deleted"
    assert blobs.size_of(path.parent.parent) > len(b"two")
    blobs.remove(path.parent.parent)
    assert s3.objects() == [] and not path.parent.parent.exists()


def test_a_file_may_move_to_an_object_store_and_back(tmp_path, s3):
    path = tmp_path / "model.pt"
    for home, objects in ((None, 0), (s3.home, 1), (None, 0)):
        blobs.write(path, b"data", home)
        assert blobs.read(path) == b"data" and path.exists() == (home is None)
        assert len(s3.objects()) == objects


def test_a_damaged_object_is_reported(tmp_path, s3):
    path = tmp_path / "model.pt"
    blobs.write(path, b"data", s3.home)
    s3.put(s3.objects()[0], b"dat")
    with pytest.raises(OSError, match="damaged") as raised:
        blobs.read(path)
    assert not isinstance(raised.value, blobs.StoreUnavailable)
    s3.client.delete_object(Bucket="models", Key=s3.objects()[0])
    with pytest.raises(FileNotFoundError):
        blobs.read(path)


def test_an_unreachable_store_is_distinguished(tmp_path, s3):
    path = tmp_path / "model.pt"
    blobs.write(path, b"data", s3.home)
    blobs.check_store(s3.home)
    assert len(s3.objects()) == 1
    with pytest.raises(blobs.StoreUnavailable, match="no-such-bucket"):
        blobs.check_store(s3.home.replace("models", "no-such-bucket"))
    s3.close()
    with pytest.raises(blobs.StoreUnavailable):
        blobs.read(path)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("somewhere", "is not a URI"),
        ("s3:bucket", "is not a URI"),
        ("s3://key:word@bucket/x", "leave keys out"),
        ("s3://bucket/x?secret_key=word", "leave keys out"),
    ],
)
def test_invalid_homes_are_rejected(uri, told):
    with pytest.raises(UserError, match=told) as raised:
        blobs.check_home(uri)
    assert "word" not in str(raised.value)


def test_names_precede_the_query():
    assert blobs.object_uri("s3://b/x/?region=r", "a b", "3") == "s3://b/x/a%20b/3?region=r"
    assert blobs.object_uri(None, "a") is None
