"""A sweep as a Ray job, submitted to a head from a folder that does not exist on the head."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_helpers import BIN, Command, states, wait_for, write_sweep

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

TASK = "from helper import WIDTH\nfrom nipq_search.tasks.vision.digits import Digits\n"
TASK += "class Mine(Digits):\n    def __init__(self):\n        super().__init__(width=WIDTH)\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def left(temporary: str) -> list[str]:
    """Return the command lines of the Ray processes that use this temporary folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().decode(errors="replace")
            found += [line] * (temporary in line)
    return found


@pytest.fixture
def head(tmp_path: Path):
    """Yield the address of the dashboard of a head with a separate home folder."""
    (tmp_path / "home").mkdir()
    port, dashboard = free_port(), free_port()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NIPQ_", "RAY_", "MLFLOW_"))}
    environment = {
        **kept,
        "HOME": str(tmp_path / "home"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "SECRET_WORD": "of-the-head",
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--port", str(port)]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    command += ["--num-cpus", "2", "--disable-usage-stats", "--ray-client-server-port"]
    command += [
        str(free_port()),
        "--dashboard-agent-listen-port",
        str(free_port()),
        "--temp-dir",
        f"/tmp/nipq-{os.getpid()}",
    ]
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        probe = [sys.executable, "-c", PROBE, address]
        wait_for(lambda: subprocess.run(probe, capture_output=True).returncode == 0, "a head")
        yield address
    finally:
        # On SIGTERM, a head would take half a minute to exit.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
        wait_for(lambda: not left(f"/tmp/nipq-{os.getpid()}"), "the head's processes to end", 60)
        shutil.rmtree(f"/tmp/nipq-{os.getpid()}", ignore_errors=True)


PROBE = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + '/api/version').read()"


def job_status(address: str, job: str) -> str:
    import urllib.request

    with urllib.request.urlopen(f"{address}/api/jobs/{job}") as answer:
        found = json.loads(answer.read())
    assert "of-the-head" not in json.dumps(found)
    return str(found["status"])


def test_a_job_runs_the_sweep_with_a_task_of_two_files(head, tmp_path):
    away = tmp_path / "laptop"
    package = away / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "helper.py").write_text("WIDTH = 4\n")
    (package / "task.py").write_text(TASK.replace("from helper", "from mine.helper"))
    write_sweep(away, task="mine.task:Mine", task_args={}, search__trials=2)
    command = Command(away, NIPQ_SECRET="of-the-laptop", RAY_AUTH_MODE="disabled")
    out = tmp_path / "out"
    done = command("submit", "sweep.yaml", "--address", head, "--out", str(out))
    job = done.stdout.strip()
    assert f"ray job logs --follow {job}" in done.stderr
    shutil.rmtree(away)  # as if the submitting machine were gone
    wait_for(lambda: job_status(head, job) not in ("PENDING", "RUNNING"), "the job", 200)
    assert job_status(head, job) == "SUCCEEDED"
    assert states(out) == ["COMPLETE"] * 2
    assert "of-the-laptop" not in "".join(p.read_text() for p in out.rglob("*.json"))
