"""The driver of a sweep: checks everything, then runs until completion, a limit or a stop request.

Start reading at `run_sweep`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from optuna.trial import TrialState

from nipq_search import file_io
from nipq_search.errors import UserError
from nipq_search.search import jobs
from nipq_search.search.backend.base import Executor
from nipq_search.search.backend.code_shipping import sources
from nipq_search.search.backend.logs import driver_log
from nipq_search.search.backend.nodes import check_data, check_plugins
from nipq_search.search.backend.tune import TuneExecutor, check_place, ray_cluster
from nipq_search.search.checks.preflight import (
    check_checkpoints,
    check_databases,
    check_folder,
    load_task,
)
from nipq_search.search.config.plugins import plugin_changes
from nipq_search.search.config.resume import check_resume
from nipq_search.search.config.space import bits_space, distribution
from nipq_search.search.config.sweep_config import (
    SweepConfig,
    load_config,
    parse_config,
)
from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.coordinator.resolved import ResolvedSweep, resolve_sweep
from nipq_search.search.jobs import FACTS_FILE, FAIL, SWEEP_FILE, committed_record, job_folder
from nipq_search.search.jobs.lease import driver_lease
from nipq_search.search.monitor import Monitor
from nipq_search.search.results.outputs import RunStatus
from nipq_search.search.results.progress import ProgressSink, SilentProgress
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.study.database_lease import study_lease
from nipq_search.search.study.ledger import Ledger
from nipq_search.search.study.storage import IDENTITY
from nipq_search.tasks import Task
from nipq_search.tasks.base import dataset

_log = logging.getLogger("nipq_search")


class RunEnd(StrEnum):
    """Why a run ended.

    Attributes:
        FINISHED: no work is left.
        LIMIT: `limits.hours` or `limits.samples` was reached before all trials had ended.
        INTERRUPTED: a signal or `stop` ended it.
    """

    FINISHED = "finished"
    LIMIT = "limit"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a run.

    Attributes:
        state: why the run ended.
        message: explanation for the user; empty if there is nothing to explain.
        complete: number of COMPLETE trials in the whole sweep.
        failed: number of failed trials in the whole sweep.
        pruned: number of pruned trials in the whole sweep.
    """

    state: RunEnd
    message: str
    complete: int
    failed: int
    pruned: int


def open_ledger(
    config: SweepConfig, task: Task, out: Path, guard: Callable[[], None] = lambda: None
) -> tuple[Ledger, ResolvedSweep]:
    """Open the ledger, compare the sweep with its earlier runs, and write the sweep's files.

    Args:
        config: the sweep configuration.
        task: the task, with its data loaded.
        out: the sweep's folder.
        guard: called before writes; raises `LeaseLost` once this driver has lost its lease.

    Returns:
        The ledger, and the resolved sweep: its graph, budgets and costs.

    Raises:
        UserError: a budget is unreachable, the study cannot be opened, the folder contains trials
            of another study, or the sweep cannot be resumed with this configuration and data.
    """
    # Budgets are checked before the study is created, so a rejected start leaves no study behind.
    resolved, data = resolve_sweep(config, task), dataset(task)
    space = {name: distribution(name, form) for name, form in config.search.space.items()}
    if config.search.bits:
        space |= bits_space(resolved.graph)
    begun = jobs.any_attempt_exists(out)
    if begun:
        # Job numbers come from the study, so another study would mistake these jobs for its own.
        known = file_io.read_json(out / FACTS_FILE)
        identity = known.get("study") if isinstance(known, dict) else None
        Ledger.load(out, config.name, identity).close()
    guard()
    ledger = Ledger.open(
        out,
        config.name,
        task.metric[1],
        space=space,
        sampler=config.search.sampler,
        seed=config.seed,
        guard=guard,
    )
    before = ledger.recall("config")
    if begun and before is None:
        raise UserError(f"--out {out}: holds trials of another study; give another folder")
    if begun or ledger.trials():
        if before is not None:
            _check_same(ledger, config, data, out)
            for change in plugin_changes(before.get("plugins", {}), config.plugins):
                _log.warning("plug-ins have changed since the sweep began: %s", change)
        resolved = resolve_sweep(config, task, ledger.recall("budgets"))
    elif before is not None:
        # No job has been started, so the earlier configuration need not match.
        _check_mode(ledger, task)
    _store_sweep(ledger, config, resolved, data, out, guard)
    return ledger, resolved


def _store_sweep(
    ledger: Ledger,
    config: SweepConfig,
    resolved: ResolvedSweep,
    data: Mapping[str, Any],
    out: Path,
    guard: Callable[[], None],
) -> None:
    """Store the configuration, budgets and data set in the study and in the sweep's folder."""
    ledger.name_metrics(resolved.metric, resolved.front_cost)
    ledger.remember("budgets", [dict(b.entry) for b in resolved.budgets])
    ledger.remember("dataset", data)
    ledger.remember("config", config.as_json())
    identity = ledger.recall(IDENTITY) or uuid.uuid4().hex
    ledger.remember(IDENTITY, identity)
    guard()
    file_io.write_json(
        out / FACTS_FILE, {**resolved.as_json(), "dataset": data, "study": identity}
    )
    text = yaml.safe_dump(config.as_json(), sort_keys=False, allow_unicode=True)
    file_io.write_bytes(out / SWEEP_FILE, text.encode())


def _check_same(ledger: Ledger, config: SweepConfig, data: Mapping[str, Any], out: Path) -> None:
    """Raise `UserError` if the sweep cannot be resumed with this configuration and these data."""
    try:
        check_resume(ledger.recall("config"), config)
        known = ledger.recall("dataset")
        if known is not None and known["digest"] != data["digest"]:
            raise UserError(
                f"the data of sweep '{config.name}' have changed since it began (digest "
                f"{str(known['digest'])[:12]} -> {str(data['digest'])[:12]}); restore the data, "
                "or give the sweep another name"
            )
    except UserError as error:
        folder = job_folder(out, "float", 0)
        if ledger.trials() or (committed_record(folder) or {}).get("state") != FAIL:
            raise
        raise UserError(f"{error}; or remove {folder}, whose job failed, to start over") from error


def _check_mode(ledger: Ledger, task: Task) -> None:
    """Raise `UserError` if an existing study optimizes the metric in the opposite direction."""
    if ledger.mode != task.metric[1]:
        raise UserError(
            f"the study of this sweep was created with mode '{ledger.mode}', but "
            f"{task.metric[0]} has mode '{task.metric[1]}'; give the sweep another name and --out"
        )


@contextlib.contextmanager
def signals_to(stop: threading.Event, progress: ProgressSink) -> Iterator[None]:
    """Set `stop` on SIGINT or SIGTERM within a block; a second signal terminates this process.

    Outside the main thread, signals are left alone, because Python can handle them only there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()
        progress.message("stopping: running trials save their state (repeat to quit immediately)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_sweep(
    config: SweepConfig,
    out: Path,
    *,
    trials: int | None = None,
    address: str | None = None,
    progress: ProgressSink | None = None,
    executor: Executor | None = None,
) -> Outcome:
    """Start or resume a sweep, and run it until it is complete, reaches a limit or is stopped.

    Args:
        config: the sweep configuration.
        out: the sweep's folder; created if missing.
        trials: total number of trials over all runs; None uses `search.trials`.
        address: address of a Ray cluster; None starts a cluster on this machine.
        progress: receives progress updates and messages; None discards them.
        executor: runs the jobs; None runs them on Ray Tune.

    Returns:
        Why the run ended, and the number of trials by state.

    Raises:
        UserError: a check before the first job failed; the message names the key and the fix.
        RuntimeError: the float model or the sensitivity scores failed, Ray did not start, a fault
            of the machine halted the sweep, this driver lost its lease, the test split could not
            be evaluated, or an output could not be written.
    """
    progress = progress or SilentProgress()
    out = out.absolute()
    if trials is not None:
        if trials < 1:
            raise UserError("--trials: must be at least 1")
        section = config.search.model_copy(update={"trials": trials})
        config = config.model_copy(update={"search": section})
    config = config.with_plugins()
    check_folder(out, config.name)
    check_databases(out)
    check_checkpoints(config.checkpoints)
    if executor is None:
        check_place(address, config.resources)
    stop = threading.Event()
    with (
        driver_lease(out) as run,
        study_lease(config.name, run) as guard,
        signals_to(stop, progress),
    ):
        task = load_task(config)
        ledger, resolved = open_ledger(config, task, out, guard)
        with contextlib.closing(ledger):
            # The coordinator and the monitor refer to each other, hence the lambdas.
            coordinator = Coordinator(
                config=config,
                resolved=resolved,
                ledger=ledger,
                out=out,
                run=run,
                limit_reached=lambda: monitor.limit_reached(),
                on_finished=lambda job: monitor.job_finished(job),
            )
            monitor = Monitor(
                out=out,
                config=config,
                resolved=resolved,
                coordinator=coordinator,
                progress=progress,
                stop=stop,
                guard=guard,
            )
            coordinator.reconcile()
            return _drive(monitor, coordinator, task, address, executor)


def _drive(
    monitor: Monitor,
    coordinator: Coordinator,
    task: Task,
    address: str | None,
    executor: Executor | None,
) -> Outcome:
    """Run all remaining jobs and write the outputs; see `run_sweep`."""
    resources = monitor.config.resources
    monitor.begin()
    idle = not coordinator.has_work()
    status = RunStatus.KILLED
    try:
        if not idle:
            code = sources(monitor.config.task)
            cluster = ray_cluster(address, resources, code)
            with (
                cluster if executor is None else contextlib.nullcontext(),
                driver_log(monitor.out),
                # Ray replaces the signal handlers when it starts, so install these again.
                signals_to(monitor.stop, monitor.progress),
            ):
                if executor is None and address is not None:
                    size = monitor.config.train.batch_size
                    stopping = monitor.stop.is_set
                    check_plugins(monitor.config.plugins, resources, stopping=stopping)
                    check_data(task, size, monitor.out, resources, stopping=stopping)
                runner = executor or TuneExecutor(resources)
                runner.run(coordinator, task, monitor.tick)
        status = RunStatus.KILLED if monitor.interrupted else RunStatus.FINISHED
        if coordinator.failure:
            status = RunStatus.FAILED
    finally:
        monitor.finish(status)
    if problem := coordinator.failure or monitor.problem:
        raise RuntimeError(problem)
    return _outcome(coordinator, monitor, idle)


def _outcome(coordinator: Coordinator, monitor: Monitor, idle: bool) -> Outcome:
    """Summarize the run; `idle` means that nothing was left to run when the run started."""
    trials = coordinator.ledger.trials()
    counts = {state: sum(t.state is state for t in trials) for state in TrialState}
    complete, failed = counts[TrialState.COMPLETE], counts[TrialState.FAIL]
    state, message = RunEnd.FINISHED, ""
    if monitor.interrupted:
        state, message = (
            RunEnd.INTERRUPTED,
            "stopped; run the same command again to resume the sweep",
        )
    elif monitor.limit and coordinator.remaining_trials():
        state = RunEnd.LIMIT
        message = (
            f"{monitor.limit} reached with {coordinator.remaining_trials()} trials remaining; "
        )
        message += "run the same command again to continue the sweep"
        if "hours" in monitor.limit:
            message += " (the test split is evaluated once the sweep is complete)"
    elif idle:
        message = f"nothing left to run: all {len(trials)} trials have ended (see --trials)"
    if failed and not complete and state is not RunEnd.INTERRUPTED:
        reasons = [t.user_attrs.get("reason") for t in trials if t.state is TrialState.FAIL]
        message = f"every trial failed; first reason: {reasons[0]}"
    return Outcome(
        state=state,
        message=message,
        complete=complete,
        failed=failed,
        pruned=counts[TrialState.PRUNED],
    )


def search(
    config: SweepConfig | Mapping[str, Any] | Path | str,
    out: Path | str | None = None,
    **options: Any,
) -> Sweep:
    """Run a sweep from Python, as `nipq-search run` does.

    Args:
        config: a sweep configuration, an equivalent mapping, or the path of a sweep file.
        out: the sweep's folder; default `runs/<name>`.
        options: keyword arguments of `run_sweep`, such as `trials` or `progress`.

    Returns:
        The sweep; its `front()` returns a pandas DataFrame.

    Raises:
        UserError: a check before the first job failed; the message names the key and the fix.
        RuntimeError: the sweep could not be completed; see `run_sweep` for the reasons.
    """
    if isinstance(config, (str, Path)):
        config = load_config(Path(config))
    elif not isinstance(config, SweepConfig):
        config = parse_config(config)
    folder = Path(out) if out is not None else Path("runs") / config.name
    run_sweep(config, folder, **options)
    return Sweep.open(folder)


__all__ = ["Outcome", "check_folder", "load_task", "open_ledger", "run_sweep", "search"]
