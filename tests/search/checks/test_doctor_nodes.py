"""Problems of a cluster's nodes, each reported with its fix."""

from __future__ import annotations

import pytest

from nipq_search.search.checks.doctor_nodes import differences, inspect_node

OWN = {
    "host": "here",
    "python": "3.11.7",
    "versions": {"torch": "2.14.1", "ray": "2.60.0", "numpy": "2.4", "scipy": "1.17"},
    "gpus": [],
    "data": "abc",
    "read": True,
    "plugins": [],
}


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({}, None),
        ({"python": "3.11.9"}, None),
        ({"python": "3.12.0"}, "Python 3.12.0, here 3.11.7: install the same version"),
        ({"versions": {**OWN["versions"], "ray": "2.59.0"}}, "ray 2.59.0, here 2.60.0"),
        ({"versions": {}}, "torch None, here 2.14.1"),
        ({"read": False}, "/shared is not the same folder as on this machine: mount it there"),
        ({"read": False, "error": "No such file"}, "this machine (No such file): mount"),
        ({"data": "xyz"}, "its data differ from the data here"),
        ({"data": None, "data_error": "no digits there"}, "the data: no digits there"),
    ],
)
def test_differences(change, fix):
    found = differences({**OWN, "host": "there", **change}, OWN, "/shared")
    assert (found == []) == (fix is None)
    assert fix is None or fix in found[0]


def test_inspection_of_a_node(tmp_path):
    (tmp_path / "token").write_text("token")
    found = inspect_node(str(tmp_path), "token", "digits", {"width": 4})
    assert found["read"] and found["data"] and "data_error" not in found
    assert not differences(found, found, str(tmp_path))
    (reply,) = tmp_path.glob("token-*")
    assert reply.read_text() == found["host"]
    away = inspect_node(str(tmp_path / "away"), "token", "digits", {"widths": 4})
    assert not away["read"] and "No such file" in away["error"]
    assert "no such argument" in away["data_error"]
