"""Compare hypervolumes of methods at equal numbers of training samples, paired by seed.

    python benchmarks/front.py benchmarks/front.yaml --json benchmarks/results/front.json

The plan specifies a pipeline, seeds, an allowance of training samples, and methods as overrides of
the pipeline in the form of `--set`. Each method and seed is a complete sweep whose jobs run
sequentially in a Ray task, so its result does not depend on the speed of the machine. All methods
of a seed start from the same float model. The allowance covers the training of the float model,
sensitivity scores, calibration and failed trials. A point counts if its training ended within the
allowance. Finished sweeps are kept, in the JSON file and in their folders, and are not repeated.
An interrupted sweep starts over, since repeated work would count against its method. The numbers
in the tables are also written to `front.summary.json` next to the JSON file.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from front_figures import accuracies, plot, summary, table
from pages import write_table

from nipq_search.errors import UserError, nearest
from nipq_search.file_io import digest, write_json
from nipq_search.search import jobs
from nipq_search.search.backend.tune import set_ray_defaults
from nipq_search.search.backend.virtual import VirtualExecutor
from nipq_search.search.config.sweep_config import SweepConfig, load_config
from nipq_search.search.jobs import Job, OutcomeKind, job_folder
from nipq_search.search.results.documents import test_metric
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.run import run_sweep
from nipq_search.search.strategies.pareto import non_dominated
from nipq_search.search.worker.worker import execute as run_job
from nipq_search.tasks import Task, make_task
from nipq_search.tasks.base import load_data

FLOAT = "float"
"""Name used in place of a method for the float model from which all methods of a seed start."""

ELSEWHERE = {"resources", "checkpoints"}
"""Keys that do not affect results: where a sweep runs and where its files are stored."""

MANY = 100_000
"""More trials than any allowance permits, so that a sweep ends when its samples are used up."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """One method, or the float model, with one seed; it corresponds to one sweep."""

    plan: Mapping[str, Any]
    method: str
    seed: int
    folder: Path

    def config(self, **more: Any) -> SweepConfig:
        """Return the pipeline with the overrides of the plan and the method, and then `more`."""
        own = self.plan["methods"].get(self.method) or {}
        name = re.sub(r"[^\w.-]+", "-", f"front-{self.method}-{self.seed}")
        fixed = {"name": name, "seed": self.seed}
        overrides = {**self.plan.get("set", {}), **own, **fixed, **more}
        texts = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        return load_config(Path(self.plan["pipeline"]), texts)

    def fingerprint(self) -> str:
        """Return a digest of everything that determines the result."""
        config = self.config().as_json()
        config = {key: value for key, value in config.items() if key not in ELSEWHERE}
        if self.method == FLOAT:
            config = {key: config[key] for key in ("seed", "task", "task_args", "float")}
        parts = [config, self.method != FLOAT and self.plan["allowance"]]
        return digest(json.dumps(parts, sort_keys=True).encode())[:16]


def float_model(base: Path) -> Path:
    """Return the path of the float model in the folder of a seed."""
    return jobs.model_file(job_folder(base / FLOAT, "float", 0))


def task_of(config: SweepConfig) -> Task:
    """Return the task of a sweep with its data loaded."""
    task = make_task(config.task, config.task_args)
    load_data(task)
    return task


def job_of(unit: Unit, config: SweepConfig, kind: str, number: int = 0, **more: Any) -> Job:
    """Return a job of the sweep in the unit's folder.

    Args:
        unit: method and seed.
        config: configuration of the sweep.
        kind: `float`, `trial` or `test`.
        number: number of the trial; 0 for other kinds.
        more: further fields of `Job`.
    """
    return Job(
        kind=kind,
        number=number,
        out=str(unit.folder.absolute()),
        config=config.as_json(),
        **{"run": "", "seed": unit.seed, **more},
    )


def done(job: Job, task: Task) -> dict[str, Any]:
    """Run or resume a job and return its record.

    Raises:
        RuntimeError: the job failed, or this machine cannot run it.
    """
    outcome = run_job(job, task, lambda report: None)
    record = jobs.committed_record(job.folder) or {}
    if outcome.kind is not OutcomeKind.COMPLETE:
        raise RuntimeError(
            f"{job.folder}: {record.get('reason') or outcome.reason or outcome.kind.value}"
        )
    return record


def train_float(unit: Unit) -> dict[str, Any]:
    """Train the float model of a seed as a sweep does, and evaluate it on the test split."""
    torch.set_num_threads(1)
    config = unit.config(**{"resources.cpus": 1})
    task = task_of(config)
    job = job_of(unit, config, "float")
    record, metric = done(job, task), task.metric[0]
    done(job_of(unit, config, "test", jobs=(job.as_json(),)), task)
    return {
        "method": FLOAT,
        "seed": unit.seed,
        "samples": jobs.samples_processed(job.folder),
        "validation": record["metrics"][metric],
        "test": test_metric(job.folder, metric),
    }


def execute(unit: Unit, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Run a method's sweep until its allowance is used up and return the results.

    Args:
        unit: method and seed.
        trained: result of `train_float` for the seed.

    Returns:
        The result. `points` contains every finished trial in the order of completion; `ended_at`
        is the number of samples processed until then, and `test` is None for trials that were
        never on the front.

    Raises:
        RuntimeError: the sweep ended before its allowance was used up.
    """
    torch.set_num_threads(1)
    shutil.rmtree(unit.folder, ignore_errors=True)
    left = unit.plan["allowance"] - trained["samples"]
    config = unit.config(
        **{
            "float.checkpoint": str(float_model(unit.folder.parent)),
            "limits": {"samples": left},  # instead of the pipeline's limits, which depend on time
            "search.trials": MANY,
            "search.baselines": [],
            "resources.cpus": 1,
        }
    )
    started = time.perf_counter()
    outcome = run_sweep(config, unit.folder, executor=VirtualExecutor())
    seconds = time.perf_counter() - started
    sweep = Sweep.open(unit.folder)
    document, cost = sweep.front_document(), sweep.facts["front_cost"]
    total = trained["samples"] + document["total_samples"]
    if total < unit.plan["allowance"]:
        raise RuntimeError(f"{unit.folder}: ended after {total} samples: {outcome.message}")
    scores = jobs.samples_processed(job_folder(unit.folder, jobs.SCORES, 0))
    processed = trained["samples"] + scores
    points = []
    for record in sorted(sweep.trials(), key=lambda r: r.ended or float("inf")):
        samples = jobs.samples_processed(job_folder(unit.folder, "trial", record.trial))
        processed += samples
        points.append(
            {
                "trial": record.trial,
                "state": record.state,
                "budget": record.budget_label,
                "cost": record.cost.get(cost),
                "validation": record.validation,
                "samples": samples,
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
        "reference": config.search.reference,
        "budgets": {b["label"]: b["targets"][cost] for b in sweep.facts["budgets"]},
        "float": {split: trained[split] for split in ("validation", "test", "samples")},
        "scoring_samples": scores,
        "total_samples": total,
        "seconds": round(seconds, 1),
        "points": points,
    }


def ever_on_front(points: list[dict[str, Any]], mode: str) -> Iterator[int]:
    """Yield the trials that were on the validation front at any time."""
    values: dict[int, tuple[float, float]] = {}
    for point in points:
        if point["state"] == "COMPLETE":
            values[point["trial"]] = (point["validation"], point["cost"])
            if point["trial"] in non_dominated(values, mode):
                yield point["trial"]


def read_test(unit: Unit, config: SweepConfig, trials: list[int]) -> None:
    """Evaluate the trials with the given numbers on the test split, as a sweep does for its front.

    Raises:
        RuntimeError: the evaluation failed.
    """
    wanted = []
    for number in trials:
        record = jobs.committed_record(job_folder(unit.folder, "trial", number)) or {}
        given = {key: record[key] for key in ("params", "budget", "seed")}
        wanted.append(job_of(unit, config, "trial", number, **given).as_json())
    done(job_of(unit, config, "test", jobs=tuple(wanted)), task_of(config))


def read_plan(file: Path, quick: bool, parts: bool = False) -> dict[str, Any]:
    """Read a plan and return it with the requested size and methods.

    Args:
        file: the YAML file.
        quick: whether to apply the overrides in `quick`, which shorten the benchmark for tests.
        parts: whether to add the methods in `parts`, which are ablations of the default.
    """
    plan = yaml.safe_load(file.read_text())
    short, more = plan.pop("quick", {}), plan.pop("parts", {})
    if parts:
        plan["methods"] = {**plan["methods"], **more}
    if quick:
        plan = {**plan, **short, "set": {**plan.get("set", {}), **short.get("set", {})}}
    return plan


def units_of(plan: Mapping[str, Any], folder: Path) -> list[Unit]:
    """Return the units of a plan: for each seed, the float model and then every method."""
    return [
        Unit(plan, method, seed, folder / f"seed-{seed}" / re.sub(r"[^\w.-]+", "-", method))
        for seed in plan["seeds"]
        for method in [FLOAT, *plan["methods"]]
    ]


def check(plan: Mapping[str, Any], results: list[dict[str, Any]]) -> None:
    """Check that all results, including those that will only be tabulated, belong to a plan.

    Raises:
        UserError: the plan is invalid, or results belong to a different plan.
    """
    known = {(r["method"], r["seed"]): r.get("fingerprint") for r in results}
    for unit in units_of(plan, Path()):
        wanted = unit.fingerprint()
        if known.get((unit.method, unit.seed), wanted) != wanted:
            raise UserError(
                f"the results of '{unit.method}', seed {unit.seed}, belong to a different plan or "
                "pipeline; choose another --json and --folder"
            )


def run_all(
    plan: dict[str, Any],
    results: list[dict[str, Any]],
    folder: Path,
    workers: int,
    save: Callable[[], None],
) -> None:
    """Run all missing methods on Ray, seed by seed, and add their results.

    Args:
        plan: the plan.
        results: known results, extended in place.
        folder: folder of the sweeps.
        workers: number of concurrent sweeps.
        save: called after each result.

    Raises:
        UserError: the plan is invalid, or results belong to a different plan; nothing was run.
    """
    check(plan, results)
    units = units_of(plan, folder)
    known = {(r["method"], r["seed"]): r for r in results}
    if all((unit.method, unit.seed) in known for unit in units):
        return
    set_ray_defaults()
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
        trainer = ray.remote(max_calls=1)(train_float)
        runner = ray.remote(max_calls=1)(execute)
        prints = {(unit.method, unit.seed): unit.fingerprint() for unit in units}
        waiting: dict[Any, tuple[str, int]] = {}
        trained: Any = None
        for unit in units:
            name = (unit.method, unit.seed)
            if unit.method == FLOAT:
                trained = known.get(name)
                if trained is None or not float_model(unit.folder.parent).exists():
                    trained = trainer.remote(unit)
                    waiting[trained] = name
            elif name not in known:
                waiting[runner.remote(unit, trained)] = name
        while waiting:
            (ended,), _ = ray.wait(list(waiting))
            name = waiting.pop(ended)
            result = {**ray.get(ended), "fingerprint": prints[name]}
            results[:] = [r for r in results if (r["method"], r["seed"]) != name] + [result]
            save()
            print(f"{name[0]}, seed {name[1]}: {result.get('seconds', 0):.0f} s", flush=True)
    finally:
        ray.shutdown()


def main() -> None:
    """Run the missing sweeps; print the tables, and write tables, summary and plot to files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, help="YAML: pipeline, seeds, allowance, methods")
    parser.add_argument("--json", type=Path, required=True, help="results; existing ones are kept")
    parser.add_argument(
        "--folder", type=Path, help="folder of the sweeps; default: next to the results"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="concurrent sweeps")
    parser.add_argument("--quick", action="store_true", help="use the quick size of the plan")
    parser.add_argument("--parts", action="store_true", help="also run the ablations in `parts`")
    parser.add_argument("--only", nargs="*", help="run only these methods")
    parser.add_argument("--page", type=Path, help="page whose tables are updated")
    parser.add_argument("--plot", type=Path, help="SVG file of hypervolume over samples")
    options = parser.parse_args()
    try:
        plan = read_plan(options.plan, options.quick, options.parts)
        whole = copy.deepcopy(plan)
        if options.only is not None:
            if unknown := set(options.only) - plan["methods"].keys():
                name = min(unknown)
                raise UserError(f"--only {name}: unknown method{nearest(name, plan['methods'])}")
            plan["methods"] = {name: plan["methods"][name] for name in options.only}
        if options.quick and options.page == Path("docs/front-quality.md"):
            raise UserError("--page: the quick size is only for tests; omit --quick or --page")
        results = json.loads(options.json.read_text()) if options.json.exists() else []
        folder = (options.folder or options.json.with_suffix("")).absolute()
        check(whole, results)
        if plan["methods"]:

            def save() -> None:
                write_json(options.json, results)

            run_all(plan, results, folder, options.workers, save)
    except (UserError, OSError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
    runs = [r for r in results if r["method"] != FLOAT and r["seed"] in whole["seeds"]]
    write_json(options.json.with_suffix(".summary.json"), summary(runs, whole))
    if options.plot:
        plot(runs, whole, options.plot)
    for name, text in (("volumes", table(runs, whole)), ("accuracies", accuracies(runs, whole))):
        if options.page:
            write_table(options.page, f"{options.plan.stem}-{name}", text)
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
