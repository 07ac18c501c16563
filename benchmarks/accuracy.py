"""Compare the accuracy of variants of a sweep file at one budget, paired over several seeds.

    python benchmarks/accuracy.py benchmarks/minilm.yaml --json minilm.json --workers 2

The plan specifies a pipeline, a budget, seeds, and variants as overrides of the pipeline in the
form of `--set`. For each seed, one float model is trained, from which all variants start.
The columns of the table contain the mean metrics on the validation and test splits, and the mean
differences on the test split from the float model and from the first variant, paired by seed, with
a 95 % interval (Student's t over seeds). Use the validation metric for selection. Finished
training runs are kept in the JSON file and are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from pages import write_table

from nipq_search.search.config.budgets import resolve_budget
from nipq_search.search.config.sweep_config import SweepConfig, load_config
from nipq_search.search.coordinator.resolved import model_graph
from nipq_search.tasks import make_task
from nipq_search.tasks.base import evaluate, load_data
from nipq_search.train import TrainSpec, train
from nipq_search.train.models import MODEL_FILE, load_trained

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: a variant, or the float model, with one seed.

    Attributes:
        plan: the plan.
        name: name of the variant, or `float`.
        seed: seed of the training run.
        folder: folder of the trained model.
    """

    plan: dict[str, Any]
    name: str
    seed: int
    folder: Path

    def config(self) -> SweepConfig:
        """Return the pipeline with the overrides of the plan and the variant."""
        own = {} if self.name == "float" else self.plan["variants"][self.name]
        overrides = {**self.plan.get("set", {}), **(own or {})}
        texts = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        return load_config(Path(self.plan["pipeline"]), texts)


def execute(run: Run) -> dict[str, Any]:
    """Train a model, evaluate it on the validation and test splits, and return the results."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    config = run.config()
    task = make_task(config.task, config.task_args)
    load_data(task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if run.name == "float":
        spec = TrainSpec(train=config.float_model.as_training(), seed=run.seed)
    else:
        budget = resolve_budget({"bops": run.plan["budget"]}, model_graph(config, task)).targets
        spec = TrainSpec(
            train=config.train,
            seed=run.seed,
            quant=config.quant,
            budget=budget,
            float_model=run.folder.parent / "float" / MODEL_FILE,
        )
    result = train(task, spec, run.folder, device)
    model = load_trained(task, spec, run.folder / MODEL_FILE, device)
    return {
        "name": run.name,
        "seed": run.seed,
        "validation": float(result.metrics[task.metric[0]]),
        "test": float(evaluate(task, model, "test")[task.metric[0]]),
        "cost": dict(result.cost),
        "steps": result.steps,
        "samples": result.samples,
        "seconds": round(time.perf_counter() - started, 1),
    }


def interval(differences: list[float]) -> tuple[float, float]:
    """Return the mean of paired differences and half its 95 % interval; NaN for a single one."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, float("nan")
    spread = statistics.stdev(differences) / len(differences) ** 0.5
    return mean, T95.get(len(differences) - 1, 2.0) * spread


def markdown(results: list[dict[str, Any]]) -> str:
    """Format the results as a Markdown table with one row per variant."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_name.setdefault(result["name"], {})[result["seed"]] = result
    names = [name for name in by_name if name != "float"]
    lines = [
        "| variant | seeds | validation | test | test, from float | test, from "
        f"{names[0] if names else 'first'} | minutes |",
        "|---|---|---|---|---|---|---|",
    ]

    def paired(name: str, other: str) -> str:
        shared = sorted(by_name[name].keys() & by_name.get(other, {}).keys())
        if name == other or not shared:
            return ""
        mean, half = interval(
            [100 * (by_name[name][s]["test"] - by_name[other][s]["test"]) for s in shared]
        )
        return f"{mean:+.2f} ± {half:.2f}" if len(shared) > 1 else f"{mean:+.2f}, one seed"

    for name, runs in by_name.items():
        means = [
            100 * statistics.fmean(r[key] for r in runs.values()) for key in ("validation", "test")
        ]
        minutes = statistics.fmean(r["seconds"] for r in runs.values()) / 60
        lines.append(
            f"| {name} | {len(runs)} | {means[0]:.2f} | {means[1]:.2f} | {paired(name, 'float')} "
            f"| {paired(name, names[0]) if names else ''} | {minutes:.1f} |"
        )
    return "\n".join(lines)


def pending(
    plan: dict[str, Any], done: Iterable[tuple[str, int]], folder: Path
) -> list[list[Run]]:
    """Return the runs that are not finished, in two stages: float models, then variants.

    Args:
        plan: the plan.
        done: name and seed of each finished run.
        folder: folder of the models.

    Returns:
        The runs of the float models, which must finish first, and the runs of the variants in the
        order of the plan.
    """
    known = set(done)

    def runs(names: Iterable[str]) -> list[Run]:
        return [
            Run(plan, name, seed, folder / str(seed) / name)
            for name in names
            for seed in plan["seeds"]
            if (name, seed) not in known
        ]

    return [runs(["float"]), runs(plan["variants"])]


def main() -> None:
    """Run what is not finished; print the table or write it to the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, help="YAML: pipeline, budget, seeds, variants")
    parser.add_argument(
        "--json", type=Path, required=True, help="file of results, which is extended"
    )
    parser.add_argument(
        "--folder", type=Path, help="folder of the models; default: next to the results"
    )
    parser.add_argument("--workers", type=int, default=1, help="concurrent training runs")
    parser.add_argument("--table", type=Path, help="page whose table of this plan is updated")
    parser.add_argument("--only", nargs="*", help="run only these variants")
    options = parser.parse_args()
    plan = yaml.safe_load(options.plan.read_text())
    if options.only:
        plan["variants"] = {name: plan["variants"][name] for name in options.only}
    results = json.loads(options.json.read_text()) if options.json.exists() else []
    folder = options.folder or options.json.with_suffix("")
    done = [(r["name"], r["seed"]) for r in results]
    for stage in pending(plan, done, folder):
        with multiprocessing.get_context("spawn").Pool(
            options.workers, maxtasksperchild=1
        ) as pool:
            for result in pool.imap_unordered(execute, stage):
                results.append(result)
                options.json.write_text(json.dumps(results, indent=1))
                print(
                    f"{result['name']} seed {result['seed']}: "
                    f"validation {result['validation']:.4f}, "
                    f"test {result['test']:.4f}, {result['seconds']:.0f} s",
                    flush=True,
                )
    if options.table:
        write_table(options.table, options.plan.stem, markdown(results))
    else:
        print(markdown(results))


if __name__ == "__main__":
    main()
