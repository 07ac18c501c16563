"""Nodes that cannot run trials, nodes that never join, and unreachable clusters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from sweep_helpers import Command, ended, reach, states, wait_for, write_sweep
from unit_helpers import digits

from nipq_search.errors import UserError
from nipq_search.file_io import write_json
from nipq_search.search import jobs
from nipq_search.search.backend import nodes
from nipq_search.search.backend.tune import ray_cluster
from nipq_search.search.config.resources import ResourcesSection
from nipq_search.search.jobs import job_folder
from nipq_search.search.worker import failures
from nipq_search.tasks.vision.digits import Digits

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

ONE = ResourcesSection(cpus=1)


class Partly(Digits):
    """A digits task whose files are on every node but one."""

    def __init__(self, lacking: str) -> None:
        super().__init__(width=4)
        self._splits = digits().splits()
        self.lacking = lacking

    def loader(self, split, batch_size, seed):
        import ray

        if ray.get_runtime_context().get_node_id() == self.lacking:
            raise FileNotFoundError(2, "No such file or directory", "/data/train")
        return super().loader(split, batch_size, seed)


def test_a_node_without_the_data_is_named_before_any_trial(tmp_path, cluster):
    import ray

    added = [cluster.add_node(num_cpus=1) for _ in range(2)]
    write_json(tmp_path / "facts.json", {})
    ray.init(
        address=cluster.address,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    try:
        nodes.check_data(Partly("none"), 8, tmp_path, ONE, own_host=True)
        lacking = Partly(added[1].node_id)
        nodes.check_data(lacking, 8, tmp_path, ONE)  # this host has loaded the data before
        with pytest.raises(UserError, match="node .*: the data cannot be read there .*/train"):
            nodes.check_data(lacking, 8, tmp_path, ONE, own_host=True)
        nodes.check_data(lacking, 8, tmp_path, ONE, own_host=True, stopping=lambda: True)
        with pytest.raises(
            UserError, match="node .*: quantizer 'x' needs fake 1, found none: .*;"
        ):
            nodes.check_plugins({"quantizer.x": "fake 1"}, ONE, own_host=True)
        nodes.check_plugins({}, ONE, own_host=True)
        more = ResourcesSection(cpus=2)  # no node that lacks the data would get such a trial
        nodes.check_data(lacking, 8, tmp_path, more, own_host=True)
        host, here = os.uname().nodename, str(tmp_path / "facts.json")
        assert failures.file_exists_on(host, here) and not failures.file_exists_on(
            host, f"{here}-not"
        )
        assert not failures.file_exists_on("no-such-host", here)
        victim = subprocess.Popen(["sleep", "600"])
        victim.send_signal(signal.SIGSTOP)
        failures.kill_on(added[0].node_id, victim.pid)
        assert victim.wait(timeout=60) == -signal.SIGKILL
        assert nodes._node_problem(lacking, 8, str(tmp_path / "other"), "") is not None
        assert "a different folder" in str(nodes._node_problem(lacking, 8, str(tmp_path), "0"))
    finally:
        ray.shutdown()


def test_an_open_cluster_is_reached_after_a_local_one(cluster, monkeypatch):
    """The local cluster requires a token, and Ray sets that mode for the rest of the process."""
    import ray

    monkeypatch.delenv("RAY_AUTH_MODE")
    cluster.add_node(num_cpus=1)
    for address in (None, cluster.address):
        with ray_cluster(address, ONE):
            assert ray.get(ray.remote(lambda: 7).remote(), timeout=60) == 7
        assert "RAY_AUTH_MODE" not in os.environ


def test_a_stop_does_not_wait_for_nodes_that_never_come(tmp_path, cluster):
    """The only node dies; trials that wait for another must not keep the sweep from ending."""
    node = cluster.add_node(num_cpus=1)
    more = {"cpus": 1, "concurrent": 2, "autoscale": True}
    write_sweep(tmp_path, search__trials=3, train__epochs=400, resources=more)
    command = Command(tmp_path)
    process = command.popen(*command.arguments("--address", cluster.address))
    trial = job_folder(command.out, "trial", 0)
    with ended(process):
        reach(process, lambda: jobs.samples_processed(trial) > 0, "the trial to train")
        cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: jobs.attempts(trial) and _lost(trial), "the lost node to be detected", 60)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, f"{stdout}\n{stderr}"
    assert time.monotonic() - began < 60
    assert set(states(command.out)) == {"RUNNING"}, "all trials can be resumed"


def _lost(trial: Path) -> bool:
    return (jobs.attempts(trial)[-1] / jobs.LOST).exists()


def test_a_type_of_node_that_is_too_small_is_refused(tmp_path, monkeypatch):
    """The file that `ray up` writes on the head lists the node types that a cluster can add."""
    monkeypatch.setattr(nodes, "alive_nodes", lambda: [{"Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(nodes, "BOOTSTRAP_FILE", tmp_path / "bootstrap.yaml")
    more = {"autoscale": True, "concurrent": 2}
    wanted = ResourcesSection(cpus=4, **more)
    nodes.check_trial_fits(wanted, grows=True)  # the types of nodes that may be added are unknown
    types = {"head": {"resources": {"CPU": 2}}, "worker": {"resources": {"CPU": 8, "GPU": 1}}}
    nodes.BOOTSTRAP_FILE.write_text(yaml.safe_dump({"available_node_types": types}))
    nodes.check_trial_fits(wanted, grows=True)
    nodes.check_trial_fits(ResourcesSection(cpus=4, gpus=1, memory_gb=99, **more), grows=True)
    message = "gpus: one trial requests 4, but the largest node type has 1"
    with pytest.raises(UserError, match=message):
        nodes.check_trial_fits(ResourcesSection(cpus=1, gpus=4, **more), grows=True)
    with pytest.raises(UserError, match="cpus: one trial requests 4, but the largest node has 2"):
        nodes.check_trial_fits(wanted, grows=False)
