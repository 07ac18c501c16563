"""Start some Python programs in the tests' warm server instead of in this process.

Python imports this file before anything else when its folder is on PYTHONPATH. If the environment
names a warm server, Ray's workers and services and the ranks of a training run do not start here:
the server forks a process that has already imported most of their modules. This process, whose
parent, arguments and environment are those of the program, waits for the forked one and exits
with its status; killing this process kills the forked one. Ray's processes end with their node;
ranks end by themselves.
"""

import os
import sys

RANK = "nipq_search.search.worker.process_group"
WORKERS = (
    "ray/_private/workers/default_worker.py",
    "ray/_private/workers/setup_worker.py",
)
SERVICES = (
    "ray/_private/log_monitor.py",
    "ray/_private/runtime_env/agent/main.py",
    "ray/autoscaler/_private/monitor.py",
    "ray/dashboard/agent.py",
    "ray/dashboard/dashboard.py",
)


def hand_over(address, ends_with_parent):
    """Have the server run this process's program, and exit as the forked process does."""
    import json
    import select
    import socket

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    request = {"argv": sys.orig_argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}
    line = json.dumps({**request, "program": True})
    socket.send_fds(connection, [f"{line}\n".encode()], [0, 1, 2])
    for number in (0, 1, 2):
        os.close(number)  # a pipe ends when the forked process closes it
    answers = connection.makefile("rb", buffering=0)
    process = answers.readline().decode().strip()
    with open("/proc/self/comm", "w") as name:
        name.write(f"warm {process}")  # for `sweep_helpers.Command.processes`
    parent = os.getppid()
    while not select.select([connection], [], [], 0.5)[0]:
        if ends_with_parent and os.getppid() != parent:
            os._exit(1)
    status = int(answers.readline() or 1)
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


server = os.environ.get("NIPQ_TEST_WARM_SERVER")
if server:
    program = " ".join(sys.orig_argv[1:3]).removeprefix("-u ").removeprefix("-m ").split(" ")[0]
    if program.endswith((RANK, *WORKERS)):
        hand_over(f"{server}.worker", ends_with_parent=program != RANK)
    elif program.endswith(SERVICES):
        hand_over(server, ends_with_parent=True)
