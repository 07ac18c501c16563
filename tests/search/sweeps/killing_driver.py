"""A script that runs a sweep like `nipq-search run`, and kills its own process at a boundary.

    killing_driver.py EXECUTOR BOUNDARY PASSAGE

EXECUTOR is `tune`, or `virtual` for a sweep without Ray whose jobs run in forked processes. The
process is killed by SIGKILL when it passes BOUNDARY for the PASSAGE-th time; 0 means never. The
sweep file is `sweep.yaml` in the current folder, and the sweep's folder is `out`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from nipq_search.cli import main
from nipq_search.search.backend.tune_callbacks import JobSearcher
from nipq_search.search.backend.virtual import Died, VirtualExecutor
from nipq_search.search.config.sweep_config import load_config
from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.jobs import Job, JobOutcome, OutcomeKind, committed_record
from nipq_search.search.results import outputs
from nipq_search.search.run import run_sweep
from nipq_search.search.worker.worker import execute
from nipq_search.tracking import MlflowRecorder

EXECUTOR, BOUNDARY, passages_left = sys.argv[1], sys.argv[2], int(sys.argv[3])


def passed(name: str) -> None:
    """Count a passage of a boundary, and kill this process at the last one."""
    global passages_left
    if name == BOUNDARY and passages_left:
        passages_left -= 1
        if not passages_left:
            os.kill(os.getpid(), signal.SIGKILL)


def before(
    owner: Any, name: str, boundary: str, wanted: Callable[..., bool] | None = None
) -> None:
    """Make the moment before every call of this method of `owner` a boundary."""
    call = getattr(owner, name)

    def killing(*args: Any, **kwargs: Any) -> Any:
        if wanted is None or wanted(*args):
            passed(boundary)
        return call(*args, **kwargs)

    setattr(owner, name, killing)


def after(owner: Any, name: str, boundary: str, wanted: Callable[..., bool] | None = None) -> None:
    """Make the moment after every call of this method of `owner` a boundary."""
    call = getattr(owner, name)

    def killing(*args: Any, **kwargs: Any) -> Any:
        found = call(*args, **kwargs)
        if wanted is None or wanted(*args):
            passed(boundary)
        return found

    setattr(owner, name, killing)


def in_a_process(job: Job, task: Any, report: Any) -> JobOutcome:
    """Execute a job in a forked process, as Ray does in a worker process."""
    process = os.fork()
    if process == 0:
        execute(job, task, lambda report: None)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    if status:
        raise Died(f"its process ended with {os.waitstatus_to_exitcode(status)}")
    return JobOutcome(kind=OutcomeKind.COMPLETE)


after(optuna.Study, "ask", "ask")
before(optuna.Study, "tell", "attributes")
after(optuna.Study, "tell", "tell")
before(
    Coordinator,
    "finished",
    "record",
    lambda self, job, *rest: job.kind == "trial" and committed_record(job.folder) is not None,
)
launcher, launch = {"tune": (JobSearcher, "suggest"), "virtual": (Coordinator, "next_job")}[
    EXECUTOR
]
after(launcher, launch, "launch")
after(MlflowRecorder, "record", "mlflow", lambda self, trial, *rest: trial.state == "COMPLETE")
after(outputs, "write_table", "parquet", lambda path, frame: len(frame) > 1)

if EXECUTOR == "tune":
    sys.exit(main(["run", "sweep.yaml", "--out", "out"]))
config = load_config(Path("sweep.yaml"))
executor = VirtualExecutor(slots=config.resources.concurrent or 1, work=in_a_process)
run_sweep(config, Path("out"), executor=executor)
