"""Helpers that run sweeps with the real command in a separate process and read their files."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

BIN = Path(sys.executable).parent
TOKEN = "NIPQ_TEST_TOKEN"
"""Environment variable that marks every process of a test's sweep."""

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 0,
    "task": "digits",
    "task_args": {"width": 4},
    "float": {"epochs": 1, "batch_size": 64},
    "quant": {
        "weights": {"bits": [2, 3, 4, 5, 6, 7, 8]},
        "activations": {"bits": [2, 3, 4, 6, 8]},
    },
    "budgets": [{"bops": "uniform 3.3"}, {"weight_bytes": "uniform 2.6"}],
    "train": {"epochs": 1, "batch_size": 64, "lr": 0.05, "distill": True},
    "search": {
        "strategy": "independent",
        "sampler": "random",
        "trials": 4,
        "baselines": [],
        "space": {"lr": {"log": [0.02, 0.1]}, "lambda": {"log": [3, 60]}},
    },
    "resources": {"cpus": 1, "gpus": 0, "concurrent": 2},
}


def write_sweep(folder: Path, **changes: Any) -> Path:
    """Write the tiny sweep with changes (`section__key=value`) to `folder/sweep.yaml`."""
    document = json.loads(json.dumps(TINY))
    for name, value in changes.items():
        *sections, key = name.split("__")
        place = document
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


class WarmProcess:
    """A process forked by a warm server, with the members of `subprocess.Popen` used here."""

    _server: subprocess.Popen[str] | None = None
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def __init__(
        self, argv: Sequence[str], script: Path | None, cwd: Path, environment: dict[str, str]
    ) -> None:
        self._output = [os.memfd_create(name) for name in ("stdout", "stderr")]
        request = {
            "argv": list(argv),
            "script": str(script) if script is not None else None,
            "cwd": str(cwd),
            "environment": environment,
        }
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(self.address())
        with open(os.devnull) as nothing:
            files = [nothing.fileno(), *self._output]
            socket.send_fds(self._connection, [f"{json.dumps(request)}\n".encode()], files)
        for close in (self._connection.close, *(partial(os.close, n) for n in self._output)):
            weakref.finalize(self, close)
        self.pid = self._answer()
        self.returncode: int | None = None

    @classmethod
    def address(cls) -> str:
        """Return the socket of this process's warm server, which the first command starts."""
        if cls._server is None:
            cls._folder = tempfile.TemporaryDirectory(prefix="nipq-warm-", dir="/tmp")
            command = [sys.executable, str(Path(__file__).with_name("warm_server.py"))]
            kept = {k: v for k, v in os.environ.items() if not k.startswith(OWN_VARIABLES)}
            cls._server = subprocess.Popen(
                [*command, f"{cls._folder.name}/socket"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**kept, "OMP_NUM_THREADS": "1"},
            )
            atexit.register(cls._server.communicate)
            assert cls._server.stdout is not None
            assert cls._server.stdout.readline() == "ready\n"
        assert cls._folder is not None
        return f"{cls._folder.name}/socket"

    def _answer(self) -> int:
        """Return the next number from the server without reading ahead, as `select` requires."""
        line = b""
        while not line.endswith(b"\n"):
            byte = self._connection.recv(1)
            assert byte, "the server ended"
            line += byte
        return int(line)

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = self._answer()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status.

        Raises:
            subprocess.TimeoutExpired: the process still runs after `timeout` seconds.
        """
        if self.poll() is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.poll()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until the process ends, and return its standard output and standard error."""
        self.wait(timeout)
        stdout, stderr = (
            os.pread(number, os.fstat(number).st_size, 0).decode() for number in self._output
        )
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def warm_start() -> dict[str, str]:
    """Return variables with which Ray's workers and the ranks of training runs are forked too."""
    folder = Path(__file__).with_name("warm_start")
    search = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "NIPQ_TEST_WARM_SERVER": WarmProcess.address(),
        # Otherwise Ray's agents end, because the node is not the parent of the forked process.
        "RAY_enable_pipe_based_agent_to_parent_health_check": "1",
        "PYTHONPATH": os.pathsep.join(search),
    }


Process = WarmProcess | subprocess.Popen[str]

OWN_VARIABLES = ("NIPQ_", "MLFLOW_", "RAY_", "PYTEST_")
"""Prefixes of environment variables that a test's commands do not inherit."""


class Command:
    """Runs `nipq-search` in a folder; `out` is the folder of the sweep.

    Args:
        folder: working directory of the commands.
        cold: whether to start the installed command and Ray's workers as for a user, instead of
            forking them from a warm server.
        environment: variables added to those of this process.
    """

    def __init__(self, folder: Path, cold: bool = False, **environment: str) -> None:
        self.folder, self.out, self.cold = folder, folder / "out", cold
        self.token = uuid.uuid4().hex
        self.sessions: set[str] = set()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(OWN_VARIABLES)}
        kept |= {} if cold else warm_start()
        self.environment = {**kept, "OMP_NUM_THREADS": "1", TOKEN: self.token, **environment}

    def arguments(self, *more: str) -> list[str]:
        """Return the arguments of `run` for the folder's sweep file."""
        return ["run", "sweep.yaml", "--out", "out", *more]

    def popen(self, *arguments: str, script: Path | None = None) -> Process:
        """Start the command, or a script instead, as the leader of a new session."""
        if not self.cold:
            process: Process = WarmProcess(arguments, script, self.folder, self.environment)
            self.sessions.add(str(process.pid))
            return process
        program = [str(BIN / "nipq-search")] if script is None else [sys.executable, str(script)]
        process = subprocess.Popen(
            [*program, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.sessions.add(str(process.pid))
        return process

    def __call__(
        self, *arguments: str, code: int = 0, script: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end and check the exit code."""
        process = self.popen(*arguments, script=script)
        with ended(process):
            stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == code, f"exit {process.returncode}\n{stdout}\n{stderr}"
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def run(self, *more: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Execute `run` to its end and check the exit code."""
        return self(*self.arguments(*more), code=code)

    def document(self, *arguments: str) -> dict[str, Any]:
        """Return the document that a read-only command prints with `--json`."""
        document: dict[str, Any] = json.loads(self(*arguments, "--json").stdout)
        assert document["schema"] == 1
        return document

    def processes(self) -> list[int]:
        """Return all running descendants of this object's commands."""
        mark = f"{TOKEN}={self.token}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    # Processes that rename themselves may overwrite their environment.
                    stat = (folder / "stat").read_text().rpartition(")")[2].split()
                    ours = stat[3] in self.sessions
                    ours = ours or mark in (folder / "environ").read_bytes().split(b"\0")
                    name = (folder / "comm").read_text()
                except OSError:
                    continue
                if ours and stat[0] != "Z":
                    found.append(int(folder.name))
                    if name.startswith("warm "):  # see `warm_start/sitecustomize.py`
                        found.append(int(name.removeprefix("warm ")))
        return found

    def no_orphans(self) -> None:
        """Assert that no process started by the commands is still running."""
        wait_for(lambda: not self.processes(), "the sweep's processes to end", 30)


@contextmanager
def ended(process: Process) -> Iterator[None]:
    """Kill a process that is still running when a test fails."""
    try:
        yield
    except BaseException:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        raise


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90) -> None:
    """Return as soon as `condition()` holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)


def reach(process: Process, condition: Callable[[], Any], what: str) -> None:
    """Return as soon as `condition()` holds; fail immediately if the process ends first."""
    wait_for(lambda: process.poll() is not None or condition(), what)
    assert process.poll() is None, f"ended before {what}:\n{process.communicate()[1]}"


def study(out: Path, name: str = "tiny") -> optuna.Study:
    """Return the sweep's study, opened by Optuna alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = JournalFileBackend(str((out / "study.log").resolve()))
        return optuna.load_study(study_name=name, storage=JournalStorage(backend))


def trials(out: Path) -> list[FrozenTrial]:
    """Return the study's trials."""
    return study(out).get_trials()


def states(out: Path) -> list[str]:
    """Return the states of the trials, by number."""
    found = trials(out)
    assert [trial.number for trial in found] == list(range(len(found)))
    return [trial.state.name for trial in found]


def attempts(out: Path, trial: int) -> list[Path]:
    """Return the attempt folders of a trial, first to last."""
    folders = (out / "trials" / str(trial)).glob("attempt-*")
    return sorted(folders, key=lambda path: int(path.name.removeprefix("attempt-")))


def epochs(attempt: Path) -> list[int]:
    """Return the epochs in an attempt's learning curve."""
    try:
        lines = (attempt / "curve.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [json.loads(line)["epoch"] for line in lines]


def result(out: Path, trial: int) -> dict[str, Any] | None:
    """Return a trial's result record; assert that at most one attempt committed one."""
    found = [record for a in attempts(out, trial) if (record := _record(a / "result.json"))]
    assert len(found) <= 1
    return found[0] if found else None


def _record(path: Path) -> dict[str, Any] | None:
    """Return a committed record; None if there is none or a later attempt superseded it."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record if record.get("state", "TAKEN_OVER") != "TAKEN_OVER" else None


def results(out: Path) -> dict[str, int]:
    """Return all committed results with their times, which change if work is repeated."""
    files = out.glob("*/**/attempt-*/result.json")
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in files if _record(path)}


class Runs:
    """The runs in a sweep's MLflow database, read with plain SQL."""

    def __init__(self, out: Path) -> None:
        with closing(sqlite3.connect(out / "mlflow.db")) as database:
            rows = database.execute("select run_uuid, name, status from runs").fetchall()
            tags: dict[str, dict[str, str]] = {row[0]: {} for row in rows}
            for run, key, value in database.execute("select run_uuid, key, value from tags"):
                tags[run][key] = value
        self.parents = [r for r in rows if "mlflow.parentRunId" not in tags[r[0]]]
        self.children = {}
        self.tags = {}
        for run, _, status in rows:
            if "mlflow.parentRunId" in tags[run]:
                number = int(tags[run]["nipq.trial"])
                assert number not in self.children, f"trial {number} has two runs"
                assert tags[run]["mlflow.parentRunId"] == self.parents[0][0]
                self.children[number] = status
                self.tags[number] = tags[run]
        assert len(self.parents) == 1
        self.parent = self.parents[0][2]
        self.parent_tags = tags[self.parents[0][0]]
