"""Write the sweep folder that `test_earlier_versions.py` opens, with an earlier version.

    git worktree add /tmp/earlier ba9aa43
    PYTHONPATH=/tmp/earlier python tests/search/compatibility/write_folder.py sweep-ba9aa43

It uses only the interfaces that all versions have: the command line and the sweep file. The sweep
has finished trials, one that failed, and one whose training was killed by SIGKILL after a
checkpoint.

Files that can be rebuilt or only repeat the figures are removed: MLflow's database and artifacts,
the report and the logs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SWEEP = {
    "name": "earlier",
    "seed": 0,
    "task": "earlier_task:Uneven",
    "float": {"epochs": 1, "batch_size": 64},
    "quant": {"activations": {"bits": [2, 3, 4, 6, 8]}},
    "budgets": [{"bops": "uniform 4"}, {"weight_bytes": "uniform 3"}],
    "train": {"epochs": 6, "batch_size": 64, "checkpoint_minutes": 0.001},
    "search": {
        "trials": 5,
        "baselines": [4],
        "space": {"lr": {"log": [0.02, 0.1]}, "lambda": {"log": [3, 60]}},
    },
    "resources": {"concurrent": 1},
}
TASK = '''
"""Digits, but training runs fail while a file named `fail` exists."""
import pathlib

from nipq_search.tasks import TASKS


class Uneven(TASKS["digits"]):
    def __init__(self):
        super().__init__(width=4)

    def loss(self, model, batch):
        if pathlib.Path(__file__).with_name("fail").exists():
            raise ValueError("this training fails")
        return super().loss(model, batch)
'''
LEFT_OUT = ("mlflow.db", "mlartifacts", "report.html", "driver.log", "driver.lock", "spool")


def command(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the command line of the version on PYTHONPATH."""
    program = [
        sys.executable,
        "-c",
        "import socket; socket.gethostname = lambda: 'earlier-host'\n",
    ]
    program[-1] += "import sys; from nipq_search.cli import main; sys.exit(main())"
    words = ["run", "sweep.yaml", "--out", "out", *arguments]
    return subprocess.Popen([*program, *words], cwd=folder, start_new_session=True)


def attempts(folder: Path, trial: int) -> list[Path]:
    """Return the attempt folders of a trial."""
    return sorted((folder / "out" / "trials" / str(trial)).glob("attempt-*"))


def anonymize(out: Path) -> None:
    """Remove the logs and replace the machine's host name."""
    for file in (*out.rglob("log*.txt"), *out.rglob("traceback.txt")):
        file.unlink()
    for file in out.rglob("started.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "host": "earlier-host"}))


def main() -> None:
    target = Path(sys.argv[1])
    folder = Path(tempfile.mkdtemp(prefix="earlier-", dir="/tmp"))
    (folder / "sweep.yaml").write_text(json.dumps(SWEEP))
    (folder / "earlier_task.py").write_text(TASK)
    assert command(folder, "--trials", "3").wait() == 0
    (folder / "fail").touch()
    assert command(folder, "--trials", "4").wait() == 3
    (folder / "fail").unlink()
    process = command(folder)
    while not any(
        len((a / "curve.jsonl").read_text().splitlines()) >= 3
        for a in attempts(folder, 4)
        if (a / "curve.jsonl").exists()
    ):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)  # until the worker detects that its driver has died
    for name in LEFT_OUT:
        place = folder / "out" / name
        shutil.rmtree(place, ignore_errors=True)
        place.unlink(missing_ok=True)
    anonymize(folder / "out")
    shutil.move(folder / "out", target)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
