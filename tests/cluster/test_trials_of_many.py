"""Trials with several processes or a fraction of a GPU, on a cluster with declared GPUs."""

from __future__ import annotations

import os
import signal

import pytest
from sweep_helpers import Command, attempts, ended, states, wait_for, write_sweep

from nipq_search import file_io
from nipq_search.search import jobs
from nipq_search.search.backend.nodes import slots
from nipq_search.search.backend.reaper import process_tree
from nipq_search.search.config.resources import ResourcesSection
from nipq_search.search.jobs import job_folder

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def members_of(folder):
    """Return the child processes of a job's running attempt."""
    found = jobs.attempts(folder)
    if not found or (found[-1] / jobs.RESULT).exists() or (found[-1] / jobs.LOST).exists():
        return []
    progress = file_io.read_json(found[-1] / jobs.PROGRESS) or {}
    leader = (file_io.read_json(found[-1] / jobs.STARTED) or {}).get("pid")
    if not progress.get("epoch"):
        return []
    return [pid for pid, (parent, _) in process_tree().items() if parent == leader]


def test_two_trials_of_two_processes_share_three_slots(tmp_path, cluster):
    """They run one after the other without a deadlock, although one of them loses a process."""
    cluster.add_node(num_cpus=3)
    write_sweep(
        tmp_path,
        search__trials=2,
        train__epochs=4,
        train__checkpoint_minutes=0.01,
        resources={"workers": 2},
        limits={"max_failures": 2},
    )
    command = Command(tmp_path)
    process = command.popen(*command.arguments("--address", cluster.address))
    trial = job_folder(command.out, "trial", 0)
    with ended(process):
        wait_for(lambda: members_of(trial), "the trial's second process", 120)
        (pid,) = members_of(trial)
        os.kill(pid, signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=250)
    assert process.returncode == 0, f"{stdout}\n{stderr}"
    assert states(command.out) == ["COMPLETE"] * 2
    assert len(attempts(command.out, 0)) == 2 and len(attempts(command.out, 1)) == 1
    command("replay", "out", "0")
    command.no_orphans()


@pytest.mark.parametrize(("gpus", "processes", "at_once"), [(0.25, 1, 4), (2, 2, 2)])
def test_trials_get_parts_of_gpus_and_several(tmp_path, cluster, gpus, processes, at_once):
    """The GPUs are only declared: Ray places the trials, which train on CPUs."""
    cluster.add_node(num_cpus=4, num_gpus=4)
    resources = {"gpus": gpus}
    write_sweep(tmp_path, search__trials=2, resources=resources)
    command = Command(tmp_path)
    command.run("--address", cluster.address)
    assert states(command.out) == ["COMPLETE"] * 2
    record = jobs.committed_record(job_folder(command.out, "trial", 1))
    assert record["workers"] == processes

    import ray

    ray.init(address=cluster.address, logging_level="ERROR")
    try:
        assert slots(ResourcesSection(**resources)) == at_once
    finally:
        ray.shutdown()


def test_more_gpus_than_any_node_has_are_refused(tmp_path, cluster):
    cluster.add_node(num_cpus=4, num_gpus=2)
    cluster.add_node(num_cpus=4, num_gpus=2)
    write_sweep(tmp_path, resources={"gpus": 4})
    command = Command(tmp_path)
    refused = command.run("--address", cluster.address, code=2).stderr
    assert "resources.gpus: one trial requests 4, but the largest node has 2" in refused
    assert not (command.out / "trials").exists()
