"""Nodes that die while trials run, as spot instances do."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from sweep_helpers import Command, ended, states, wait_for, write_sweep

from nipq_search import file_io
from nipq_search.search import jobs
from nipq_search.search.jobs import job_folder

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def in_training(folder: Path) -> str | None:
    """Return the node of a job's latest attempt if that has processed samples and still runs."""
    found = jobs.attempts(folder)
    if not found or any((found[-1] / name).exists() for name in (jobs.RESULT, jobs.LOST)):
        return None
    progress = file_io.read_json(found[-1] / jobs.PROGRESS) or {}
    started = file_io.read_json(found[-1] / jobs.STARTED) or {}
    return started.get("node") if progress.get("samples", 0) > 0 else None


def test_a_dead_node_costs_a_trial_nothing_but_time(tmp_path, cluster):
    """Two nodes die and others continue the trial, although a single crash would fail it."""
    added = [cluster.add_node(num_cpus=1) for _ in range(3)]
    nodes = {node.node_id: node for node in added}
    write_sweep(
        tmp_path,
        search__trials=1,
        train__epochs=40,
        train__checkpoint_minutes=0.01,
        resources__concurrent=1,
        limits={"max_failures": 1},
    )
    command = Command(tmp_path)
    process = command.popen(*command.arguments("--address", cluster.address))
    trial = job_folder(command.out, "trial", 0)
    with ended(process):
        for _ in range(2):
            wait_for(lambda: in_training(trial) in nodes, "the trial to train", 120)
            time.sleep(1)
            cluster.remove_node(nodes.pop(in_training(trial)), allow_graceful=False)
        stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, f"{stdout}\n{stderr}"
    assert states(command.out) == ["COMPLETE"]
    causes = [jobs.cause_of(attempt) for attempt in jobs.attempts(trial)]
    assert causes == ["node", "node", None]
    command("replay", "out", "0")  # the same result as without faults
