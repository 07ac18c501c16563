"""The files that launch clusters: Ray's schema, their structure, and runs with fake tools."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

FOLDER = Path(__file__).parent.parent.parent / "pipelines" / "cluster"
SLURM = FOLDER / "slurm.sh"


def read(name):
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize("name", ["aws.yaml", "on_premises.yaml"])
def test_ray_up_files_keep_ray_s_schema(name):
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    document = read(name)
    jsonschema.validate(document, json.loads(schema.read_text()))
    if "available_node_types" in document:
        assert document["head_node_type"] in document["available_node_types"]
        assert any(kind != document["head_node_type"] for kind in document["available_node_types"])
    starts = document["head_start_ray_commands"][-1], document["worker_start_ray_commands"][-1]
    for start in starts:
        assert "RAY_AUTH_MODE=token" in start and "RAY_USAGE_STATS_ENABLED=0" in start
    assert "--dashboard-host=127.0.0.1" in starts[0] and "--head" in starts[0]
    assert "--address=$RAY_HEAD_IP:6379" in starts[1]
    assert "~/.ray/auth_token" in document["file_mounts"]


def test_the_ray_job_has_the_structure_of_kuberay():
    document = read("rayjob.yaml")
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayJob")
    spec = document["spec"]
    shell, option, line = shlex.split(spec["entrypoint"])
    assert (shell, option) == ("bash", "-c"), "the entry point is a single command"
    words = line.partition(";")[0].split()
    assert words[:2] == ["nipq-search", "run"] and words[-2] == "--out"
    assert words[words.index("--address") + 1] == "auto"
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    version = ".".join(ray.__version__.split(".")[:2])
    assert cluster["rayVersion"].startswith(version), "the image has Ray's pinned version"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
        assert "NIPQ_STORAGE_URL" not in variables, "secrets are passed as files"
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        roots = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert any(words[-1].startswith(root) for root in roots)
    (worker,) = cluster["workerGroupSpecs"]
    assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


@pytest.mark.parametrize(("code", "told"), [(0, 0), (1, 1), (2, 2), (3, 0), (130, 0), (137, 137)])
def test_the_ray_job_is_not_retried_where_somebody_stopped_it(tmp_path, code, told):
    (tmp_path / "nipq-search").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "nipq-search").chmod(0o755)
    # KubeRay's shell passes the words after `--` to Ray, which quotes them for the job's shell.
    (tmp_path / "submit").write_text(
        f"#!{sys.executable}\nimport shlex, subprocess, sys\n"
        "sys.exit(subprocess.run(shlex.join(sys.argv[2:]), shell=True).returncode % 256)\n"
    )
    (tmp_path / "submit").chmod(0o755)
    line = "submit -- " + read("rayjob.yaml")["spec"]["entrypoint"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = f"if ! false ; then {line} ; fi"
    assert subprocess.run(["bash", "-ec", line], env=environment).returncode == told


@pytest.mark.parametrize("name", ["aws.yaml", "on_premises.yaml"])
def test_every_node_installs_the_same_versions(name):
    (install,) = [line for line in read(name)["setup_commands"] if "pip install" in line]
    assert "--constraint ~/nipq-search/constraints.txt" in install
    assert (FOLDER.parent.parent / "constraints.txt").exists()
    assert ("boto3" in install) == (read(name)["provider"]["type"] == "aws")


def test_the_image_is_built_from_what_is_there():
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    root = FOLDER.parent.parent
    assert copied and all((root / name).exists() for name in copied)


def test_shellcheck_has_nothing_to_say():
    program = shutil.which("shellcheck")
    assert program, "shellcheck is not installed: make test-packages"
    done = subprocess.run([program, str(SLURM)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


TOOLS = {
    "scontrol": 'printf "node1\\nnode2\\n"',
    "srun": 'echo "srun $*" >> "$LOG"; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "ray": (
        'echo "ray $*" >> "$LOG"; while [ $# -gt 0 ] && [ "$1" != -- ]; do shift; done; '
        '[ $# -eq 0 ] || { shift; exec "$@"; }'
    ),
    "nipq-search": (
        'echo "nipq-search $*" >> "$LOG"; if [ "$1" = stop ]; then touch "$LOG.stop"; exit 0; fi; '
        "for _ in $(seq 100); do "
        '[ ! -e "$LOG.stop" ] || { echo saved >> "$LOG"; exit 130; }; '
        '[ -z "$QUICK" ] || exit "$QUICK"; sleep 0.1; done'
    ),
}


@pytest.fixture
def slurm(tmp_path):
    """A function that starts the script as Slurm would; its `log` records the tools' arguments."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in TOOLS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
    }

    def start(quick=""):
        return subprocess.Popen(
            [str(SLURM), "my sweep.yaml", "/shared/out"], env=environment | {"QUICK": quick}
        )

    start.log = tmp_path / "log"
    return start


@pytest.mark.parametrize("code", ["0", "3"])
def test_slurm_runs_one_sweep_over_all_nodes(slurm, code):
    assert slurm(code).wait(timeout=30) == int(code)
    lines = slurm.log.read_text().splitlines()
    assert lines[0] == "ray get-auth-token --generate"
    assert lines[1].startswith("srun --ntasks=2 --ntasks-per-node=1 ray symmetric-run ")
    assert "--address node1:6379 --min-nodes 2 -- nipq-search run my sweep.yaml" in lines[2]
    assert lines[3] == "nipq-search run my sweep.yaml --out /shared/out --address auto"


def test_slurm_s_signal_stops_the_sweep_gracefully(slurm):
    process = slurm()
    while "nipq-search run" not in (slurm.log.read_text() if slurm.log.exists() else ""):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 130
    lines = slurm.log.read_text().splitlines()
    assert lines[-2:] == ["nipq-search stop /shared/out", "saved"]
