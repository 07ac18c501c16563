"""Ray's autoscaler adds nodes on this machine for waiting trials."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweep_helpers import BIN, Command, states, wait_for, write_sweep

from nipq_search import file_io
from nipq_search.search import jobs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture
def autoscaling(tmp_path: Path) -> Iterator[str]:
    """Yield the address of a head without resources for trials; nodes of one core can be added.

    `ray.cluster_utils.AutoscalingCluster` does the same, but its `ray stop` would also stop
    unrelated clusters on this machine.
    """
    import ray

    command = Command(tmp_path, RAY_AUTH_MODE="disabled", RAY_FAKE_CLUSTER="1")
    command.environment |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    worker = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    lists = ("setup_commands", "initialization_commands", "head_setup_commands")
    lists += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    lists += ("cluster_synced_files", "rsync_exclude", "rsync_filter")
    config = {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "disable_node_updaters": True,  # there is nothing to log in to
            "disable_launch_config_check": True,
            "use_node_id_as_ip": True,  # all nodes share one address
        },
        "auth": {},
        "docker": {},
        "available_node_types": {"ray.head.default": head, "worker": worker},
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }
    (tmp_path / "fake.json").write_text(json.dumps(config))
    temporary = f"/tmp/nipq-scale-{os.getpid()}"
    line = [str(BIN / "ray"), "start", "--head", "--block", "--port", str(port), "--num-cpus=0"]
    line += ["--autoscaling-config", str(tmp_path / "fake.json"), "--temp-dir", temporary]
    line += ["--include-dashboard=false"]
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(
            line, env=command.environment, stdout=log, stderr=log, start_new_session=True
        )
    command.sessions.add(str(process.pid))
    health = [str(BIN / "ray"), "health-check", "--address", address]
    try:
        wait_for(lambda: subprocess.run(health, env=command.environment).returncode == 0, "a head")
        yield address
    finally:
        for _ in range(3):  # some processes start others while they exit
            for pid in command.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)


def test_nodes_come_while_trials_wait(tmp_path, autoscaling):
    folder = tmp_path / "sweep"
    folder.mkdir()
    write_sweep(folder, search__trials=4, train__epochs=30)
    command = Command(folder, RAY_AUTH_MODE="disabled")
    arguments = command.arguments("--address", autoscaling)
    done = command(*arguments, code=2)
    assert "resources.cpus: one trial requests 1, but the largest node has 0" in done.stderr

    more = {"cpus": 1, "concurrent": 2, "autoscale": True}
    write_sweep(folder, search__trials=4, train__epochs=30, resources=more)
    command(*arguments)
    assert states(command.out) == ["COMPLETE"] * 4
    started = [
        file_io.read_json(attempt / jobs.STARTED)
        for number in range(4)
        for attempt in jobs.attempts(jobs.job_folder(command.out, "trial", number))
    ]
    assert len({entry["node"] for entry in started}) == 2
