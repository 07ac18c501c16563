"""`ui`: serves MLflow and optuna-dashboard for one sweep, on the loopback interface only."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from nipq_search.cli.exit_codes import SUCCESS
from nipq_search.cli.output import emit_text, print_message
from nipq_search.errors import UserError

HOST = "127.0.0.1"
MLFLOW_PORT = 5000
OPTUNA_PORT = 8080
START_SECONDS = 120.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.2

_MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # no information about the sweep leaves the machine
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # would start additional processes
}
# Runs the console script `optuna-dashboard`, wherever it is installed.
_OPTUNA_PROGRAM = (
    "import sys; from importlib.metadata import entry_points; "
    "(program,) = entry_points(group='console_scripts', name='optuna-dashboard'); "
    "sys.exit(program.load()())"
)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A dashboard to start.

    Attributes:
        name: name to display.
        command: program and arguments.
        port: port on the loopback interface.
        environment: environment variables added to those of this process.
    """

    name: str
    command: Sequence[str]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """URL of the dashboard."""
        return f"http://{HOST}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Running:
    """A started dashboard.

    Attributes:
        server: the dashboard.
        process: its process.
        output: temporary file that receives its stdout and stderr.
    """

    server: Server
    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def check(self) -> None:
        """Raise RuntimeError with the last line of the output if the dashboard has exited."""
        if self.process.poll() is None:
            return
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"{self.server.name} has exited: {lines[-1] if lines else 'no output'}")


def ui(folder: Path, mlflow_port: int | None, optuna_port: int | None) -> int:
    """Serve the dashboards of a sweep until Ctrl-C, SIGTERM or SIGHUP, then terminate them.

    Args:
        folder: the sweep's folder.
        mlflow_port: port for MLflow; None selects 5000, or a free port if 5000 is in use.
        optuna_port: port for optuna-dashboard; None selects 8080, or a free port if 8080 is in
            use.

    Returns:
        The exit code.

    Raises:
        UserError: the folder contains neither a study nor an MLflow database, or a requested port
            is in use.
        RuntimeError: a dashboard did not start, or exited unexpectedly.
        ModuleNotFoundError: MLflow or optuna-dashboard is not installed.
    """
    servers = plan_servers(folder, mlflow_port, optuna_port)
    with _signals_interrupt(), contextlib.ExitStack() as stack:
        running = [stack.enter_context(_started(server, folder)) for server in servers]
        for dashboard in running:
            _wait_until_it_answers(dashboard)
            emit_text(f"{dashboard.server.name}: {dashboard.server.url}\n")
        with contextlib.suppress(KeyboardInterrupt):  # the expected way to exit, with code 0
            print_message("press Ctrl-C to exit")
            while True:
                for dashboard in running:
                    dashboard.check()
                time.sleep(POLL_SECONDS)
    return SUCCESS


def plan_servers(folder: Path, mlflow_port: int | None, optuna_port: int | None) -> list[Server]:
    """Return the dashboards for which `folder` contains data; report missing data on stderr.

    Args:
        folder: the sweep's folder.
        mlflow_port: port for MLflow; None selects one as in `ui`.
        optuna_port: port for optuna-dashboard; None selects one as in `ui`.

    Returns:
        The dashboards to start.

    Raises:
        UserError: the folder contains data for neither dashboard, or a requested port is in use.
        ModuleNotFoundError: MLflow or optuna-dashboard is not installed.
    """
    store = folder / "mlflow.db"
    studies = [path for path in (folder / "study.log", folder / "study.db") if path.exists()]
    if not store.exists() and not studies:
        raise UserError(
            f"{folder}: no local databases of a sweep (mlflow.db, study.log or study.db); give "
            "the folder that `run` wrote to"
        )
    servers = []
    if store.exists():
        port = _port(mlflow_port, MLFLOW_PORT, "--mlflow-port")
        servers.append(_mlflow(port))
    else:
        print_message(
            f"{folder} has no mlflow.db: the runs are on the server at MLFLOW_TRACKING_URI"
        )
    if studies:
        port = _port(optuna_port, OPTUNA_PORT, "--optuna-port")
        servers.append(_optuna_dashboard(studies[0], port))
    else:
        print_message(f"{folder} has no study.log or study.db: the study is at NIPQ_STORAGE_URL")
    return servers


def _mlflow(port: int) -> Server:
    # Use paths relative to the sweep's folder: absolute ones break if the folder is moved.
    options = {
        "--backend-store-uri": "sqlite:///mlflow.db",
        "--artifacts-destination": "./mlartifacts",
        "--host": HOST,
        "--port": str(port),
        "--workers": "1",
    }
    command = [*_python("mlflow"), "-m", "mlflow", "server"]
    for option in options.items():
        command += option
    return Server(name="MLflow", command=command, port=port, environment=_MLFLOW_ENVIRONMENT)


def _optuna_dashboard(study: Path, port: int) -> Server:
    # Use an absolute path: with a relative one, Optuna never releases a journal's stale lock.
    place = str(study.resolve()) if study.suffix == ".log" else f"sqlite:///{study.resolve()}"
    command = [*_python("optuna_dashboard"), "-c", _OPTUNA_PROGRAM, place]
    command += ["--host", HOST, "--port", str(port)]
    return Server(name="optuna-dashboard", command=command, port=port)


def _python(module: str) -> list[str]:
    """Return a command that runs Python; raise ModuleNotFoundError if `module` is missing."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)
    return [sys.executable, "-P"]  # import nothing from the sweep's folder


def _port(wanted: int | None, usual: int, option: str) -> int:
    """Return the requested port; if none was requested, the usual port or any free one."""
    for port in [wanted] if wanted else [usual, 0]:
        with socket.socket() as probe:
            # Like the servers, treat a port in the TIME_WAIT state as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return int(probe.getsockname()[1])
    raise UserError(f"{option} {wanted}: the port is in use; give another one, or omit the option")


@contextlib.contextmanager
def _started(server: Server, folder: Path) -> Iterator[Running]:
    """Start a dashboard in the sweep's folder; terminate it on exit."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            server.command,
            cwd=folder,
            env={**os.environ, **server.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a separate process group, so that children can be killed
        )
        try:
            yield Running(server=server, process=process, output=output)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process gracefully, then kill the rest of its process group."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_it_answers(dashboard: Running) -> None:
    """Wait for a dashboard; raise RuntimeError if it exits or does not answer in time."""
    deadline = time.monotonic() + START_SECONDS
    while not _answers(dashboard.server.port):
        dashboard.check()
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{dashboard.server.name} did not start within {START_SECONDS:.0f} s"
            )
        time.sleep(POLL_SECONDS)


def _answers(port: int) -> bool:
    # http.client ignores the proxy settings of the environment.
    connection = http.client.HTTPConnection(HOST, port, timeout=STOP_SECONDS)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status < 400
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP (a closed terminal) like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
