"""The driver of a sweep: check everything, then run to the end, a limit, or a request to stop."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from optuna.trial import TrialState

from nipq_search import storage
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
from nipq_search.search.config.space import bits_space, distribution
from nipq_search.search.config.sweep_config import (
    SweepConfig,
    check_resume,
    load_config,
    parse_config,
)
from nipq_search.search.coordinator.coordinator import Coordinator
from nipq_search.search.coordinator.resolved import Facts, gather
from nipq_search.search.jobs import FACTS_FILE, FAIL, SWEEP_FILE, committed, job_folder
from nipq_search.search.jobs.lease import driver_lease
from nipq_search.search.monitor import Driver
from nipq_search.search.results.progress import ProgressSink, Silent
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.study.database_lease import study_lease
from nipq_search.search.study.ledger import Ledger
from nipq_search.search.study.storage import IDENTITY
from nipq_search.tasks import Task
from nipq_search.tasks.base import dataset

_log = logging.getLogger("nipq_search")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: `finished`, `limit` (hours or samples used up) or `interrupted`.
        message: what to tell a person, or empty.
        complete: COMPLETE trials of the whole sweep.
        failed: failed trials of the whole sweep.
        pruned: pruned trials of the whole sweep.
    """

    state: str
    message: str
    complete: int
    failed: int
    pruned: int


def open_ledger(
    config: SweepConfig, task: Task, out: Path, guard: Callable[[], None] = lambda: None
) -> tuple[Ledger, Facts]:
    """The ledger, checked against an earlier run's configuration, and the sweep's facts.

    Args:
        config: the sweep.
        task: its task, the data loaded.
        out: its folder.
        guard: raises once this driver must write nothing more.

    Raises:
        UserError: a budget cannot be reached; or the configuration or the data differ from those
            of a sweep of which anything was started.
    """
    # Budgets are checked before the study exists, so that nothing is left of a bad start.
    facts, data = gather(config, task), dataset(task)
    space = {name: distribution(name, form) for name, form in config.search.space.items()}
    if config.search.bits:
        space |= bits_space(facts.graph)
    begun = jobs.have_begun(out)
    if begun:
        # Jobs are numbered by their study: those of another one would count as this one's.
        known = storage.read_json(out / FACTS_FILE)
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
    )
    ledger.guard = guard
    before = ledger.recall("config")
    if begun and before is None:
        raise UserError(f"--out {out}: holds trials of another study; give another folder")
    if begun or ledger.trials():
        if before is not None:
            _check_same(ledger, config, data, out)
            for change in plugin_changes(before.get("plugins", {}), config.plugins):
                _log.warning("plug-ins changed since the sweep began: %s", change)
        facts = gather(config, task, ledger.recall("budgets"))
    elif before is not None:
        # Nothing has been started yet: this is a new beginning, whatever was wanted before.
        _check_mode(ledger, task)
    ledger.name_metrics(facts.metric, facts.front_cost)
    ledger.remember("budgets", [dict(b.entry) for b in facts.budgets])
    ledger.remember("dataset", data)
    ledger.remember("config", config.as_json())
    identity = ledger.recall(IDENTITY) or uuid.uuid4().hex
    ledger.remember(IDENTITY, identity)
    guard()
    storage.write_json(out / FACTS_FILE, {**facts.as_json(), "dataset": data, "study": identity})
    text = yaml.safe_dump(config.as_json(), sort_keys=False, allow_unicode=True)
    storage.write_bytes(out / SWEEP_FILE, text.encode())
    return ledger, facts


def _check_same(ledger: Ledger, config: SweepConfig, data: Mapping[str, Any], out: Path) -> None:
    """Raise `UserError` where configuration or data are not those that the sweep began with."""
    try:
        check_resume(ledger.recall("config"), config)
        known = ledger.recall("dataset")
        if known is not None and known["digest"] != data["digest"]:
            raise UserError(
                f"the data of sweep '{config.name}' changed since it began (digest "
                f"{str(known['digest'])[:12]} -> {str(data['digest'])[:12]}); restore them, or "
                "give the sweep another name"
            )
    except UserError as error:
        folder = job_folder(out, "float", 0)
        if ledger.trials() or (committed(folder) or {}).get("state") != FAIL:
            raise
        raise UserError(f"{error}; or remove {folder}, which failed, to begin anew") from error


def _check_mode(ledger: Ledger, task: Task) -> None:
    """Raise `UserError` where a study made earlier wants the metric's other direction."""
    if ledger.mode != task.metric[1]:
        raise UserError(
            f"the study of this sweep was made for a metric with '{ledger.mode}', and "
            f"{task.metric[0]} has '{task.metric[1]}'; give the sweep another name and --out"
        )


@contextlib.contextmanager
def signals_to(stop: threading.Event, progress: ProgressSink) -> Iterator[None]:
    """Let SIGINT and SIGTERM set `stop`; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()
        progress.message("stopping: running trials save their state (once more to end at once)")

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
    """Start a sweep, or resume it.

    Args:
        config: the sweep.
        out: its folder; created if missing.
        trials: trials in all, instead of the configuration's.
        address: of a Ray cluster; None starts one on this machine.
        progress: shows how far it is.
        executor: runs the jobs; default Ray Tune.

    Raises:
        UserError: anything that is wrong before the first job starts.
        RuntimeError: the float model failed, a disk is full, or the results could not be shown.
    """
    progress = progress or Silent()
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
        ledger, facts = open_ledger(config, task, out, guard)
        with contextlib.closing(ledger):
            driver = Driver(
                out=out, config=config, facts=facts, progress=progress, stop=stop, guard=guard
            )
            coordinator = Coordinator(
                config=config,
                facts=facts,
                ledger=ledger,
                out=out,
                run=run,
                enough=driver.enough,
                on_finished=driver.job_finished,
            )
            return _drive(driver, coordinator, task, address, executor)


def _drive(
    driver: Driver,
    coordinator: Coordinator,
    task: Task,
    address: str | None,
    executor: Executor | None,
) -> Outcome:
    """Run what there is to run; see `run_sweep`."""
    resources = driver.config.resources
    driver.begin(coordinator)
    idle = not coordinator.has_work()
    ended = "KILLED"
    try:
        if not idle:
            # Ray installs handlers of its own when it starts: ours go on top of them.
            code = sources(driver.config.task)
            cluster = ray_cluster(address, resources, code)
            with (
                cluster if executor is None else contextlib.nullcontext(),
                driver_log(driver.out),
                signals_to(driver.stop, driver.progress),
            ):
                if executor is None and address is not None:
                    size = driver.config.train.batch_size
                    stopping = driver.stop.is_set
                    check_plugins(driver.config.plugins, resources, stopping=stopping)
                    check_data(task, size, driver.out, resources, stopping=stopping)
                runner = executor or TuneExecutor(resources)
                runner.run(coordinator, task, driver.tick)
        ended = "KILLED" if driver.interrupted else "FINISHED"
        if coordinator.failure:
            ended = "FAILED"
    finally:
        driver.finish(ended)
    if problem := coordinator.failure or driver.problem:
        raise RuntimeError(problem)
    return _outcome(coordinator.ledger, coordinator, driver, idle)


def _outcome(ledger: Ledger, coordinator: Coordinator, driver: Driver, idle: bool) -> Outcome:
    trials = ledger.trials()
    counts = {state: sum(t.state is state for t in trials) for state in TrialState}
    complete, failed = counts[TrialState.COMPLETE], counts[TrialState.FAIL]
    state, message = "finished", ""
    if driver.interrupted:
        state, message = "interrupted", "stopped; the same command resumes"
    elif driver.limit and coordinator.open_trials():
        state = "limit"
        message = f"{driver.limit} reached with {coordinator.open_trials()} trials to go; "
        message += "the same command continues"
        if "hours" in driver.limit:
            message += ", and the test split is read at its end"
    elif idle:
        message = f"nothing left to run: all {len(trials)} trials have ended (see --trials)"
    if failed and not complete and state != "interrupted":
        reasons = [t.user_attrs.get("reason") for t in trials if t.state is TrialState.FAIL]
        message = f"every trial failed; the first one: {reasons[0]}"
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
    """Run a sweep from Python: what `nipq-search run` does.

    Args:
        config: the sweep: a configuration, the same as a mapping, or a sweep file.
        out: its folder; default `runs/<name>`.
        options: as in `run_sweep`, for example `trials` or `progress`.

    Returns:
        The sweep; `front()` is a pandas table.

    Raises:
        UserError: anything that is wrong before the first job starts.
    """
    if isinstance(config, (str, Path)):
        config = load_config(Path(config))
    elif not isinstance(config, SweepConfig):
        config = parse_config(config)
    folder = Path(out) if out is not None else Path("runs") / config.name
    run_sweep(config, folder, **options)
    return Sweep.open(folder)


__all__ = ["Outcome", "check_folder", "load_task", "open_ledger", "run_sweep", "search"]
