"""Measure the driver's overhead: CPU time and latency per trial, memory, and idle slots.

    python benchmarks/orchestration.py --json benchmarks/results/orchestration.json

Trials are stubs that write records as workers do; the searcher, strategy, sampler, ledger, tables
and MLflow are real. The benchmark has four parts, each of which is a key of the JSON file. Parts
whose results are in that file are not repeated.

    growth      trials in virtual time: CPU time of the driver and latencies around trials 100,
                1,000 and 10,000
    concurrent  1,000 concurrent trials in virtual time: peak memory of the driver
    idle        Ray Tune, four slots, trials of a minute: share of the time that slots are idle
    many        Ray Tune, fifty slots: number of trials that ran concurrently

For the first two parts, set TMPDIR=/dev/shm to exclude the disk from the measurement.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pages import write_table

from nipq_search import file_io
from nipq_search.file_io import write_json
from nipq_search.search import jobs
from nipq_search.search.backend.tune import TuneExecutor, set_ray_defaults
from nipq_search.search.backend.virtual import VirtualExecutor
from nipq_search.search.config.sweep_config import SweepConfig, parse_config
from nipq_search.search.jobs import TEST_FILE, Job, JobOutcome, OutcomeKind
from nipq_search.search.results.outputs import Outputs
from nipq_search.search.run import run_sweep
from nipq_search.search.study.ledger import Ledger
from nipq_search.train.loop import seed_for
from nipq_search.train.models import MODEL_FILE

SWEEP = {
    "name": "orchestration",
    "task": "digits",
    "task_args": {"width": 4},
    "budgets": [{"bops": f"uniform {bits}"} for bits in (5, 4, 3.5, 3, 2.6)],
    "search": {
        "baselines": [],
        "space": {
            "lr": {"log": [0.01, 0.2]},
            "lambda": {"log": [1, 100]},
            "noise_share": {"uniform": [0.1, 0.6]},
            "distill_weight": {"uniform": [0, 1]},
            "lr_bits": {"log": [1, 10]},
        },
    },
}


def config_of(trials: int, concurrent: int) -> SweepConfig:
    """Return the configuration of the sweep for a given number of trials and slots."""
    document = json.loads(json.dumps(SWEEP))
    document["search"]["trials"] = trials
    document["resources"] = {"concurrent": concurrent}
    return parse_config(document)


def stub(
    job: Job, task: Any, report: Callable[[dict[str, Any]], None], seconds: float = 0
) -> JobOutcome:
    """Write the attempt, curve, model and record as a worker does, without training.

    Args:
        job: the job.
        task: ignored.
        report: ignored.
        seconds: duration of the job.

    Returns:
        The outcome, COMPLETE.
    """
    attempt = jobs.open_attempt(job)
    time.sleep(seconds)
    point = {"epoch": 1, "step": 9, "phase": "tuning", "timestamp": time.time()}
    point["metrics"] = {"train_loss": 0.5, "validation_accuracy": 0.9}
    (attempt / jobs.CURVE).write_text(json.dumps(point) + "\n")
    write_json(attempt / jobs.PROGRESS, {"samples": 100, "epoch": 1, "time": time.time()})
    for entry in job.jobs:
        file_io.write_sealed(Job(**entry).folder / TEST_FILE, {"metrics": {"accuracy": 0.9}})
    model = job.name.encode()
    file_io.write_bytes(attempt / MODEL_FILE, model)
    luck = seed_for(job.seed, 1) / 2**31
    jobs.commit(
        attempt,
        {
            "state": jobs.COMPLETE,
            "reason": None,
            "ended": time.time(),
            "metrics": {"accuracy": 0.9 if job.kind == "float" else 0.5 + 0.4 * luck},
            "cost": {name: 0.99 * target for name, target in job.budget.items()},
            "params": dict(job.params),
            "budget": dict(job.budget),
            "parent": job.parent,
            "epochs_share": job.epochs_share,
            "seed": job.seed,
            "samples": 100,
            "steps": 9,
            "seconds": 60.0,
            "threads": 1,
            "attempts": 1,
            "model_sha256": file_io.digest(model),
        },
    )
    return JobOutcome(kind=OutcomeKind.COMPLETE)


class Clock:
    """Measures this process's CPU time, excluding the stubs, and the wall time of driver calls."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = {"ask": [], "tell": [], "record": []}
        self.stubs = 0.0
        self.ends: list[tuple[float, float]] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time the driver's calls inside the context."""
        wanted = [
            (Ledger, "ask", "ask"),
            (Ledger, "complete", "tell"),
            (Outputs, "record", "record"),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in wanted]
        for (owner, name, call), (_, _, key) in zip(before, wanted, strict=True):
            setattr(owner, name, self._timing(call, key))
        try:
            yield
        finally:
            for owner, name, call in before:
                setattr(owner, name, call)

    def _timing(self, call: Any, key: str) -> Any:
        """Return `call`, wrapped so that its wall time is appended to `calls[key]`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.calls[key].append(time.perf_counter() - began)

        return timed

    def work(self, job: Job, task: Any, report: Any) -> JobOutcome:
        """Run the stub and count its CPU time separately.

        Args:
            job: see `stub`.
            task: see `stub`.
            report: see `stub`.

        Returns:
            The outcome of the stub.
        """
        began = time.process_time()
        outcome = stub(job, task, report)
        self.stubs += time.process_time() - began
        self.ends.append((time.process_time() - self.stubs, time.perf_counter()))
        return outcome


def growth(folder: Path, trials: int, slots: int) -> list[dict[str, float]]:
    """Measure the driver's CPU time and latencies around trials 100, 1,000 and 10,000.

    Args:
        folder: the folder in which the sweep is stored.
        trials: number of trials; windows beyond it are omitted.
        slots: number of concurrent trials.

    Returns:
        For each window, which is the last fifth of the trials up to its end, the number of trials
        at its end, the CPU time per trial, and the median latency of each call, in milliseconds.
    """
    clock = Clock()
    executor = VirtualExecutor(slots, clock.work, lambda job: 60 + 20 * seed_for(job.seed) / 2**31)
    with clock.timed():
        run_sweep(config_of(trials, slots), folder / "growth", executor=executor)
    rows = []
    for end in (100, 1_000, 10_000):
        if end > trials:
            break
        first = int(0.8 * end)
        window = slice(first, end)
        spent = clock.ends[end][0] - clock.ends[first][0]
        rows.append(
            {
                "trials": end,
                "cpu_ms": 1000 * spent / (end - first),
                **{
                    f"{key}_ms": 1000 * statistics.median(calls[window])
                    for key, calls in clock.calls.items()
                },
            }
        )
    return rows


def concurrent(folder: Path, slots: int) -> dict[str, float]:
    """Return `slots` and `peak_gb`, the driver's peak memory with that many concurrent trials."""
    executor = VirtualExecutor(slots, stub, lambda job: 60 + 20 * seed_for(job.seed) / 2**31)
    run_sweep(config_of(2 * slots, slots), folder / "concurrent", executor=executor)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"slots": slots, "peak_gb": peak}


def on_ray(folder: Path, slots: int, waves: int, seconds: float) -> dict[str, float]:
    """Measure on Ray Tune how many slots are idle and how many trials run concurrently.

    The trials only sleep.

    Args:
        folder: the folder in which the sweep is stored.
        slots: number of concurrent trials.
        waves: number of trials per slot.
        seconds: duration of each trial.

    Returns:
        The settings; `idle`, the share of slot time without an attempt between the first trial
        and the last wave; and `at_once`, the peak number of concurrent trials.
    """
    import functools

    set_ray_defaults()
    import ray

    ray.init(
        address="local",
        num_cpus=slots,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
    )
    config = config_of(slots * waves, slots)
    try:
        runner = TuneExecutor(config.resources, functools.partial(_sleeper, seconds=seconds))
        run_sweep(config, folder / "sweep", executor=runner)
    finally:
        ray.shutdown()
    spans = []
    for number in range(slots * waves):
        (attempt,) = jobs.attempts(jobs.job_folder(folder / "sweep", "trial", number))
        began = file_io.read_json(attempt / jobs.STARTED)["time"]
        ended = (file_io.read_sealed(attempt / jobs.RESULT) or {})["ended"]
        spans.append((began, ended))
    spans.sort()
    # Slots become idle one by one in the last wave, which is therefore excluded.
    first, last = spans[0][0], spans[-slots][0]
    busy = sum(min(ended, last) - began for began, ended in spans if began < last)
    share = 1 - busy / (slots * (last - first))
    at_once = max(sum(a <= began < b for a, b in spans) for began, _ in spans)
    return {
        "slots": slots,
        "trials": slots * waves,
        "seconds": seconds,
        "idle": share,
        "at_once": at_once,
    }


def _sleeper(job: Job, task: Any, report: Any, seconds: float) -> JobOutcome:
    """Run the stub, which sleeps for `seconds` if the job is a trial."""
    return stub(job, task, report, seconds if job.kind == "trial" else 0)


def tables(found: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    lines = []
    if rows := found.get("growth"):
        lines += ["| trials | CPU per trial | ask | tell | record |", "|---|---|---|---|---|"]
        lines += [
            f"| {r['trials']:,} | {r['cpu_ms']:.0f} ms | {r['ask_ms']:.0f} ms | "
            f"{r['tell_ms']:.1f} ms | {r['record_ms']:.0f} ms |"
            for r in rows
        ]
    if row := found.get("concurrent"):
        memory = f"{row['peak_gb']:.2f} GB."
        lines += ["", f"Peak memory with {row['slots']:,} concurrent trials: {memory}"]
    if row := found.get("idle"):
        lines += [
            "",
            f"Idle share on Ray with {row['slots']} slots and {row['trials']} trials of "
            f"{row['seconds']:.0f} s: {100 * row['idle']:.1f} %.",
        ]
    if row := found.get("many"):
        lines += [
            "",
            f"Peak concurrency of {row['trials']} trials of {row['seconds']:.0f} s on "
            f"{row['slots']} slots of one machine, through Ray Tune: {row['at_once']}.",
        ]
    return "\n".join(lines)


def main() -> None:
    """Run the parts without results; print the table and write it to the page, if one is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", type=Path, required=True, help="file of results, which is extended"
    )
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument(
        "--slots", type=int, default=1_000, help="concurrent trials in virtual time"
    )
    parser.add_argument("--waves", type=int, default=5, help="trials per slot on Ray")
    parser.add_argument("--seconds", type=float, default=60, help="duration of a trial on Ray")
    parser.add_argument("--only", nargs="*", default=["growth", "concurrent", "idle", "many"])
    parser.add_argument("--page", type=Path, help="page whose table is updated")
    options = parser.parse_args()
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    parts = {
        "growth": lambda folder: growth(folder, options.trials, 8),
        "concurrent": lambda folder: concurrent(folder, options.slots),
        "idle": lambda folder: on_ray(folder, 4, options.waves, options.seconds),
        # Starting fifty processes takes half a minute on two cores.
        "many": lambda folder: on_ray(folder, 50, 2, 60),
    }
    for name in options.only:
        if name in found:
            continue
        folder = Path(tempfile.mkdtemp(prefix="nipq-orchestration-"))
        try:
            found[name] = parts[name](folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        write_json(options.json, found)
    text = tables(found)
    if options.page:
        write_table(options.page, "orchestration", text)
    print(text)


if __name__ == "__main__":
    main()
