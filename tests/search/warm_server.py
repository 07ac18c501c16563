"""A process that has imported all modules and forks a new process for every command.

Importing torch, Ray, Optuna and MLflow takes a command longer than what most tests have it do.
Each fork is a real process in a session of its own, with its own environment, folder and output;
only its imports are done already. `sweep_helpers.Command` is the client.

Protocol, over a Unix socket: a request is one JSON line with `argv`, `script`, `cwd` and
`environment`, and three file descriptors; the answers are two lines, the process id and the exit
status as `subprocess` has it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from mlflow_template import use_template  # noqa: E402

MODULES = [
    "mlflow.pytorch",
    "mlflow.tracking",
    "plotly.graph_objects",
    "ray.tune",
    "scipy.optimize",
    "sklearn.datasets",
    "torch._dynamo",
    "nipq_search.cli.app",
    "nipq_search.cli.read",
    "nipq_search.cli.run",
    "nipq_search.report.html",
    "nipq_search.search.backend.tune_callbacks",
    "nipq_search.search.commands.replay",
    "nipq_search.search.run",
]


def import_everything() -> None:
    """Import the modules of the commands in the environment of a command."""
    from nipq_search.search.backend.tune import quiet_environment

    quiet_environment()
    for name in MODULES:
        importlib.import_module(name)


def become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Apply a request's descriptors, directory and environment to this process."""
    import random

    import numpy
    import torch

    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    random.seed()
    numpy.random.seed()
    torch.seed()


def run(request: dict[str, Any]) -> int:
    """Run the command, or a script in its place, and return the exit status."""
    argv, script = request["argv"], request["script"]
    sys.argv = [script or os.path.join(os.path.dirname(sys.executable), "nipq-search"), *argv]
    sys.path[0] = os.path.dirname(sys.argv[0])
    try:
        if script is None:
            from nipq_search.cli import main

            return main()
        runpy.run_path(script, run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def end(status: int) -> None:
    """Exit as the interpreter does; `sys.exit` would return into the server."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)


def serve_one(connection: socket.socket) -> None:
    """Fork for one request and reply with the new process's ID and exit status."""
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 20)
    process = os.fork()
    if process == 0:
        connection.close()
        request = json.loads(data)
        become(request, descriptors)
        end(run(request))
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(f"{process}\n".encode())
    _, status = os.waitpid(process, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def main() -> None:
    """Serve until standard input closes."""
    import select

    import_everything()
    use_template()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(sys.argv[1])
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        # A process in between waits for the command, so that this one can serve the next.
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            serve_one(connection)
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    main()
