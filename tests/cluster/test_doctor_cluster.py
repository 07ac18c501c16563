"""`doctor` checks every node and reports problems by node."""

from __future__ import annotations

import pytest
from sweep_helpers import Command, write_sweep

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_every_node_is_asked(tmp_path, cluster):
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=2)
    write_sweep(tmp_path)
    command = Command(tmp_path)
    arguments = ["doctor", "sweep.yaml", "--address", cluster.address, "--out", "."]
    document = command.document(*arguments)
    nodes = [check for check in document["checks"] if check["check"].startswith("node ")]
    assert document["ok"] and len(nodes) == 3
    assert sum("2 CPUs" in check["detail"] for check in nodes) == 1
    assert not list(tmp_path.glob(".doctor-*"))
    assert "cluster" in command(*arguments).stdout

    done = command("doctor", "--address", cluster.address, "--out", "missing", code=1)
    assert "missing: not writable" in done.stdout
