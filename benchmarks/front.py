"""Fronts for equal training samples: the hypervolume that each method reaches, paired by seed.

    python benchmarks/front.py benchmarks/front.yaml --json benchmarks/results/front.json

The plan names a pipeline, seeds, an allowance of training samples, and methods: overrides of the
pipeline as `--set` takes them. A method with a seed is a whole sweep, run one job after another in
a Ray task, so its result does not hang on the machine's pace; methods of a seed start from one
float model. Everything counts: the float model's training, scores, calibration, failed trials. A
point counts if its training ended within the allowance. Whatever has finished is kept, in the JSON
file and in the sweeps' folders, and not run again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from front_figures import accuracies, plot, table
from pages import write_table

from nipq_search.errors import UserError
from nipq_search.search import jobs
from nipq_search.search.config import SweepConfig, load_config
from nipq_search.search.coordinator import Coordinator
from nipq_search.search.executor import quiet_environment
from nipq_search.search.front import non_dominated
from nipq_search.search.jobs import Job, job_folder
from nipq_search.search.run import run_sweep
from nipq_search.search.sweep import Sweep
from nipq_search.search.view import test_metric
from nipq_search.search.worker import HALT
from nipq_search.search.worker import execute as run_job
from nipq_search.storage import write_json
from nipq_search.tasks import Task, make_task
from nipq_search.tasks.base import evaluate, load_data
from nipq_search.train import Hooks, TrainSpec, train
from nipq_search.train.trial import MODEL_FILE, load_trained

MANY = 100_000
"""Trials that no allowance holds: the samples end a sweep."""


class Serial:
    """Runs a sweep's jobs one after another, in this process."""

    def run(self, coordinator: Coordinator, task: Task, tick: Callable[[], None]) -> None:
        """See `nipq_search.search.executor.Executor`."""
        while isinstance(job := coordinator.next_job(), Job):
            state = run_job(job, task, lambda report: None)
            if state.startswith(HALT):
                coordinator.halt(state.removeprefix(HALT))
            coordinator.finished(job)
            tick()


@dataclasses.dataclass(frozen=True)
class Unit:
    """One method, or the float model, with one seed."""

    plan: Mapping[str, Any]
    method: str
    seed: int
    folder: Path

    def config(self, **more: Any) -> SweepConfig:
        """The pipeline with the plan's overrides, the method's, and more."""
        own = self.plan["methods"].get(self.method) or {}
        name = re.sub(r"[^\w.-]+", "-", f"front-{self.method}-{self.seed}")
        fixed = {"name": name, "seed": self.seed}
        overrides = {**self.plan.get("set", {}), **own, **fixed, **more}
        texts = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        return load_config(Path(self.plan["pipeline"]), texts)


def task_of(config: SweepConfig) -> Task:
    """The task with its data in memory."""
    task = make_task(config.task, config.task_args)
    load_data(task)
    return task


def train_float(unit: Unit) -> dict[str, Any]:
    """Train the float model of a seed."""
    torch.set_num_threads(1)
    config = unit.config()
    task, cpu = task_of(config), torch.device("cpu")
    spec = TrainSpec(train=config.float_model.as_training(), seed=unit.seed)
    counted = 0

    def count(samples: int) -> None:
        nonlocal counted
        counted += samples

    result = train(task, spec, unit.folder, cpu, Hooks(on_samples=count))
    model = load_trained(task, spec, unit.folder / MODEL_FILE, cpu)
    metric = task.metric[0]
    return {
        "method": "float",
        "seed": unit.seed,
        "samples": counted,
        "validation": result.metrics[metric],
        "test": evaluate(task, model, "test")[metric],
    }


def execute(unit: Unit, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Run a method's sweep to the end of its allowance and say what came out.

    Returns:
        `points` holds every finished trial in the order in which they ended; `ended_at` is what
        had been processed by then, and `test` is there for all that ever were on the front.
    """
    torch.set_num_threads(1)
    left = unit.plan["allowance"] - trained["samples"]
    config = unit.config(
        **{
            "float.checkpoint": str(unit.folder.parent / "float" / MODEL_FILE),
            "limits.samples": left,
            "search.trials": MANY,
            "search.baselines": [],
            "resources.cpus": 1,
        }
    )
    started = time.perf_counter()
    run_sweep(config, unit.folder, executor=Serial())
    seconds = time.perf_counter() - started
    sweep = Sweep.open(unit.folder)
    document, cost = sweep.front_document(), sweep.facts["front_cost"]
    scores = jobs.samples_processed(job_folder(unit.folder, jobs.SCORES, 0))
    processed = trained["samples"] + scores
    points = []
    for record in sorted(sweep.trials(), key=lambda r: r.ended or float("inf")):
        processed += record.samples
        points.append(
            {
                "trial": record.trial,
                "state": record.state,
                "budget": record.budget_label,
                "cost": record.cost.get(cost),
                "validation": record.validation,
                "samples": record.samples,
                "ended_at": processed,
                "seconds": record.seconds,
                "parent": record.parent,
                "params": dict(record.params),
            }
        )
    metric, mode = sweep.facts["metric"], sweep.facts["mode"]
    read_test(unit, config, list(ever_on_front(points, mode)))
    for point in points:
        point["test"] = test_metric(job_folder(unit.folder, "trial", point["trial"]), metric)
    return {
        "method": unit.method,
        "seed": unit.seed,
        "mode": mode,
        "axis": sweep.facts["axis"],
        "budgets": {b["label"]: b["targets"][cost] for b in sweep.facts["budgets"]},
        "float": {split: trained[split] for split in ("validation", "test", "samples")},
        "scoring_samples": scores,
        "total_samples": trained["samples"] + document["total_samples"],
        "seconds": round(seconds, 1),
        "points": points,
    }


def ever_on_front(points: list[dict[str, Any]], mode: str) -> Iterator[int]:
    """Trials that were on the validation front at some moment."""
    values: dict[int, tuple[float, float]] = {}
    for point in points:
        if point["state"] == "COMPLETE":
            values[point["trial"]] = (point["validation"], point["cost"])
            if point["trial"] in non_dominated(values, mode):
                yield point["trial"]


def read_test(unit: Unit, config: SweepConfig, trials: list[int]) -> None:
    """Evaluate trials on the test split, as the end of a sweep does for its front."""
    out = unit.folder.absolute()

    def job(kind: str, number: int, **more: Any) -> Job:
        document = config.as_json()
        return Job(kind=kind, number=number, out=str(out), config=document, run="", seed=0, **more)

    wanted = []
    for number in trials:
        record = jobs.committed(job_folder(out, "trial", number)) or {}
        subject = job("trial", number, params=record["params"], budget=record["budget"])
        wanted.append(dataclasses.replace(subject, seed=record["seed"]).as_json())
    state = run_job(job("test", 0, jobs=tuple(wanted)), task_of(config), lambda report: None)
    if state != jobs.COMPLETE:
        raise RuntimeError(f"{out}: the test split could not be read ({state})")


def read_plan(file: Path, quick: bool) -> dict[str, Any]:
    """A plan, in its quick size if wanted."""
    plan = yaml.safe_load(file.read_text())
    short = plan.pop("quick", {})
    if quick:
        plan = {**plan, **short, "set": {**plan.get("set", {}), **short.get("set", {})}}
    return plan


def run_all(
    plan: dict[str, Any],
    results: list[dict[str, Any]],
    folder: Path,
    workers: int,
    save: Callable[[], None],
) -> None:
    """Run what `results` lacks, on Ray, seed by seed, and add to it."""
    for method in plan["methods"]:
        Unit(plan, method, 0, folder).config()  # whatever is wrong in the plan shows now
    quiet_environment()
    import ray

    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )
    try:
        known = {(r["method"], r["seed"]): r for r in results}
        trainer = ray.remote(max_calls=1)(train_float)
        runner = ray.remote(max_calls=1)(execute)
        waiting: dict[Any, tuple[str, int]] = {}
        for seed in plan["seeds"]:
            base = folder / f"seed-{seed}"
            trained = known.get(("float", seed))
            if trained is None or not (base / "float" / MODEL_FILE).exists():
                trained = trainer.remote(Unit(plan, "float", seed, base / "float"))
                waiting[trained] = ("float", seed)
            for method in plan["methods"]:
                if (method, seed) not in known:
                    unit = Unit(plan, method, seed, base / re.sub(r"[^\w.-]+", "-", method))
                    waiting[runner.remote(unit, trained)] = (method, seed)
        while waiting:
            (ended,), _ = ray.wait(list(waiting))
            name = waiting.pop(ended)
            result = ray.get(ended)
            results[:] = [r for r in results if (r["method"], r["seed"]) != name] + [result]
            save()
            print(f"{name[0]}, seed {name[1]}: {result.get('seconds', 0):.0f} s", flush=True)
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, help="YAML: pipeline, seeds, allowance, methods")
    parser.add_argument("--json", type=Path, required=True, help="results; kept and added to")
    parser.add_argument("--folder", type=Path, help="sweeps; default: beside the results")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="sweeps at a time")
    parser.add_argument("--quick", action="store_true", help="the plan's quick size")
    parser.add_argument("--only", nargs="*", help="these methods")
    parser.add_argument("--page", type=Path, help="page whose tables are written anew")
    parser.add_argument("--plot", type=Path, help="SVG of hypervolume over samples")
    options = parser.parse_args()
    plan = read_plan(options.plan, options.quick)
    whole = copy.deepcopy(plan)
    if options.only is not None:
        plan["methods"] = {name: plan["methods"][name] for name in options.only}
    if options.quick and options.page == Path("docs/front-quality.md"):
        parser.error("--page: the quick size is for tests, not for the documentation")
    results = json.loads(options.json.read_text()) if options.json.exists() else []
    folder = (options.folder or options.json.with_suffix("")).absolute()
    try:
        run_all(plan, results, folder, options.workers, lambda: write_json(options.json, results))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    runs = [r for r in results if r["method"] != "float"]
    if options.plot:
        plot(runs, whole, options.plot)
    for name, text in (("volumes", table(runs, whole)), ("accuracies", accuracies(runs, whole))):
        if options.page:
            write_table(options.page, f"{options.plan.stem}-{name}", text)
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
