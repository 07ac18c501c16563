"""A process that has imported all modules and forks a new process for every command.

Importing torch, Ray, Optuna and MLflow takes longer than the actual work of most tests.
Each fork is a real process in a session of its own, with its own environment, folder and output;
only its imports are already done. There are two clients: `sweep_helpers.Command` for commands,
`warm_start/sitecustomize.py` for Ray's processes and the ranks of a training run.

Protocol, over a Unix socket: a request is one JSON line with `argv`, `cwd` and `environment`, and
three file descriptors; the reply consists of two lines, the process ID and the exit status as
reported by `subprocess`. A request for a command also has `script`, the path of a Python file or
None for `nipq-search`. A request for a Python program has `program`; its `argv` are the
interpreter's arguments, and the process is killed when the client disconnects.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from mlflow_template import use_template  # noqa: E402

WORKER_MODULES = [
    "pandas",
    "pyarrow",
    "scipy.optimize",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.distributed",
    "nipq_search.search.worker.process_group",
    "nipq_search.search.worker.worker",
    "nipq_search.tasks.vision.digits",
]
"""Modules of Ray's workers and of ranks."""
COMMAND_MODULES = [
    "mlflow.pytorch",
    "mlflow.tracking",
    "plotly.graph_objects",
    "ray._private.log_monitor",
    "ray._private.runtime_env.agent.runtime_env_agent",
    "ray.autoscaler._private.monitor",
    "ray.dashboard.agent",
    "ray.dashboard.dashboard",
    "ray.tune",
    "nipq_search.cli.app",
    "nipq_search.cli.read",
    "nipq_search.cli.run",
    "nipq_search.report.html",
    "nipq_search.search.backend.tune_callbacks",
    "nipq_search.search.commands.replay",
    "nipq_search.search.run",
]
"""Additional modules of commands."""
NO_JOB = "ffffffff"
"""The job ID of workers that Ray starts before there is a job."""
PR_SET_PDEATHSIG = 1
BASE_PATH = [path for path in sys.path[1:] if path]
"""The module search path without the folder of the program."""


def import_all(names: list[str]) -> None:
    """Import modules."""
    for name in names:
        importlib.import_module(name)


def replace_actor_class_ids() -> None:
    """Replace Ray's class; call this before other modules of Ray are imported."""
    import ray.actor

    ray.actor.ActorClassID = OwnActorClassID


class OwnActorClassID:
    """Draws the IDs of actor classes, which are assigned at import, without Ray's generator.

    Ray's generator is seeded when it is first used. Processes forked after that would draw the
    same IDs of nodes, workers and objects as each other, and clash within a cluster.
    """

    @staticmethod
    def from_random() -> Any:
        """Return a random ID."""
        from ray import ActorClassID

        return ActorClassID(os.urandom(ActorClassID.size()))


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
    sys.path[:] = [*BASE_PATH]
    tempfile.tempdir = None
    if "ray" in sys.modules:  # it read its variables when it was imported
        from ray._raylet import AuthenticationTokenLoader, Config

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
    random.seed()
    numpy.random.seed()
    torch.seed()


def run(request: dict[str, Any]) -> int:
    """Run the requested command, script or Python program, and return the exit status."""
    try:
        if request.get("program"):
            return run_program(request["argv"])
        return run_command(request["argv"], request["script"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def run_command(argv: list[str], script: str | None) -> int:
    """Run `nipq-search ARGV`, or a script instead, and return the exit status."""
    sys.argv = [script or os.path.join(os.path.dirname(sys.executable), "nipq-search"), *argv]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    if script is None:
        from nipq_search.cli import main

        return main()
    runpy.run_path(script, run_name="__main__")
    return 0


def run_program(argv: list[str]) -> int:
    """Run `python ARGV`, one of Ray's programs or a module, and return the exit status."""
    while argv[0].startswith("-") and argv[0] != "-m":
        argv = argv[1:]
    if argv[0].endswith("setup_worker.py"):
        argv = set_up_worker(argv[1:])
    search = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in search if path]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, os.getcwd())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, os.path.dirname(argv[0]))
        runpy.run_path(argv[0], run_name="__main__")
    return 0


def set_up_worker(argv: list[str]) -> list[str]:
    """Apply a worker's runtime environment; return the arguments of the worker itself."""
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs
    from ray._private.workers.setup_worker import parser

    args, worker = parser.parse_known_args(argv)
    context = RuntimeEnvContext.deserialize(args.serialized_runtime_env_context or "{}")
    assert context.py_executable == sys.executable and not context.command_prefix
    update_envs(context.env_vars)
    return worker


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
    request = json.loads(data)
    process = os.fork()
    if process == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        connection.close()
        become(request, descriptors)
        end(run(request))
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(f"{process}\n".encode())
    if request.get("program"):
        ended = os.pidfd_open(process)
        if connection in select.select([connection, ended], [], [])[0]:
            os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(BrokenPipeError):  # the client was killed
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def serve(listener: socket.socket) -> None:
    """Serve until standard input closes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
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


def main() -> None:
    """Serve programs on the socket `ARGUMENT.worker`, and commands on `ARGUMENT`."""
    os.setsid()  # Ctrl-C ends the client first
    listeners = []
    for address in (f"{sys.argv[1]}.worker", sys.argv[1]):
        listeners.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listeners[-1].bind(address)
        listeners[-1].listen()
    programs, commands = listeners
    import_all(WORKER_MODULES)
    if os.fork() == 0:
        commands.close()
        # Ray reads these at import. The client ends with its node, and its worker with the client.
        os.environ |= {"RAY_JOB_ID": NO_JOB, "RAY_RAYLET_PID": str(os.getpid())}
        replace_actor_class_ids()
        import_all(["ray.tune"])
        serve(programs)
    programs.close()
    replace_actor_class_ids()

    from nipq_search.search.backend.tune import set_ray_defaults

    set_ray_defaults()
    os.environ["RAY_enable_pipe_based_agent_to_parent_health_check"] = "1"
    import_all(COMMAND_MODULES)
    use_template()
    print("ready", flush=True)
    serve(commands)


if __name__ == "__main__":
    main()
