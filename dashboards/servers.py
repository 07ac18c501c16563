"""Web servers for the screenshots, started on free ports and terminated with their children."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 120.0
"""Time after which a server that does not respond counts as failed."""

STOP_SECONDS = 20.0
"""Time that a server has to exit after SIGTERM, before SIGKILL is sent."""


def free_port() -> int:
    """Return a TCP port that is currently unused on the loopback interface."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def answers(url: str) -> bool:
    """Return whether `url` responds with any HTTP status."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, urllib.error.URLError):
        return False


@contextmanager
def serve(command: Sequence[str], port: int, folder: Path) -> Iterator[str]:
    """Run a server, wait until it responds, yield its address, and terminate it on exit.

    Args:
        command: the command line of the server.
        port: the port on which the server listens.
        folder: the working directory of the server.

    Yields:
        The address of the server.

    Raises:
        RuntimeError: the server exited or did not respond in time; the message contains its
            output.
    """
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # would start additional processes
    }
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a new process group, to terminate its workers as well
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    printed = output.read().decode(errors="replace")[-1000:]
                    raise RuntimeError(f"{' '.join(command)} does not respond: {printed}")
                time.sleep(0.2)
            yield address
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate the process group of a server: SIGTERM first, then SIGKILL if necessary."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
            return
        except ProcessLookupError:
            process.wait(STOP_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue


def mlflow_command(port: int) -> list[str]:
    """Return the `mlflow ui` command for a sweep's folder."""
    return [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"]


def optuna_command(study: str, port: int) -> list[str]:
    """Return the `optuna-dashboard` command for a study file in a sweep's folder."""
    program = Path(sys.executable).with_name("optuna-dashboard")
    storage = f"sqlite:///{study}" if study.endswith(".db") else study
    return [str(program), storage, "--host", "127.0.0.1", "--port", str(port)]
