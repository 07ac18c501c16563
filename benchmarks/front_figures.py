"""Compute the hypervolumes, intervals, tables and plot of `front.py`."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nipq_search.search.strategies.pareto import default_reference, hypervolume, non_dominated

Run = Mapping[str, Any]
"""Result of one method and one seed; see `front.execute`."""

RESAMPLES = 10_000
"""Number of bootstrap samples for an interval."""


def kept(run: Run, samples: float) -> list[Mapping[str, Any]]:
    """Return the COMPLETE trials whose training ended within `samples`."""
    return [p for p in run["points"] if p["state"] == "COMPLETE" and p["ended_at"] <= samples]


def front(run: Run, samples: float) -> list[Mapping[str, Any]]:
    """Return the validation front of the points finished within `samples`."""
    points = kept(run, samples)
    values = {i: (p["validation"], p["cost"]) for i, p in enumerate(points)}
    return [points[i] for i in sorted(non_dominated(values, run["mode"]))]


def volume(run: Run, samples: float, split: str = "test") -> float:
    """Return the hypervolume of `front`, with the axes and reference of `nipq-search front`.

    Args:
        run: the result of a method and seed.
        samples: number of samples after which points are ignored.
        split: `validation` or `test`; points are selected on the validation split either way.

    Returns:
        The normalized area; 0 if no point counts.
    """
    best, given = run["float"][split], run.get("reference")
    found = hypervolume(
        [(p[split], p["cost"]) for p in front(run, samples)],
        axis=tuple(run["axis"]),
        reference=default_reference(best, run["mode"]) if given is None else given,
        best=best,
        mode=run["mode"],
    )
    return found or 0.0


def curve(run: Run, allowance: float) -> list[tuple[float, float]]:
    """Return the test hypervolume after each finished trial, as pairs (samples, hypervolume)."""
    ends = [p["ended_at"] for p in kept(run, allowance)]
    return [(end, volume(run, end)) for end in ends]


def samples_to(run: Run, wanted: float, allowance: float) -> float | None:
    """Return the samples needed to reach a test hypervolume, or None if it is never reached.

    Args:
        run: the result of a method and seed.
        wanted: the hypervolume.
        allowance: samples after which points are ignored.

    Returns:
        The number of samples processed by the end of the first trial that reaches it.
    """
    return next((s for s, v in curve(run, allowance) if v >= wanted), None)


def accuracy_at(run: Run, budget: float, allowance: float) -> float | None:
    """Return the test metric of the point with the best validation metric within a budget.

    Args:
        run: the result of a method and seed.
        budget: maximum front cost.
        allowance: samples after which points are ignored.

    Returns:
        The metric, or None if no point is within the budget.
    """
    sign = 1 if run["mode"] == "max" else -1
    fitting = [p for p in kept(run, allowance) if p["cost"] <= budget]
    return max(fitting, key=lambda p: sign * p["validation"])["test"] if fitting else None


def bootstrap(differences: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95 % percentile bootstrap interval."""
    generator = random.Random(0)
    means = sorted(
        statistics.fmean(generator.choices(differences, k=len(differences)))
        for _ in range(RESAMPLES)
    )
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    return statistics.fmean(differences), low, high


def by_method(runs: Sequence[Run], names: Sequence[str]) -> dict[str, dict[int, Run]]:
    """Group runs by method, in the order of `names`, and by seed."""
    ordered = sorted(runs, key=lambda run: run["seed"])
    found = {name: {r["seed"]: r for r in ordered if r["method"] == name} for name in names}
    return {name: seeds for name, seeds in found.items() if seeds}


def _differences(
    ours: Mapping[int, Run], theirs: Mapping[int, Run], allowance: float
) -> list[float]:
    """Return the difference in hypervolume for each seed that both methods have."""
    shared = sorted(ours.keys() & theirs.keys())
    return [volume(ours[s], allowance) - volume(theirs[s], allowance) for s in shared]


def _shares(
    ours: Mapping[int, Run], goal: Mapping[int, Run], allowance: float
) -> list[float | None]:
    """Return the share of the allowance at which each seed reaches the goal's hypervolume."""
    shared = sorted(ours.keys() & goal.keys())
    found = [samples_to(ours[s], volume(goal[s], allowance), allowance) for s in shared]
    return [None if f is None else f / allowance for f in found]


def _difference(ours: Mapping[int, Run], theirs: Mapping[int, Run], allowance: float) -> str:
    """Format the mean difference in hypervolume and its interval; empty without a shared seed."""
    differences = _differences(ours, theirs, allowance)
    if len(differences) < 2:
        return f"{differences[0]:+.4f}, one seed" if differences else ""
    mean, low, high = bootstrap(differences)
    return f"{mean:+.4f} ({low:+.4f}, {high:+.4f})"


def _reach(ours: Mapping[int, Run], goal: Mapping[int, Run], allowance: float) -> str:
    """Format the median share of the allowance at which a method reaches the goal's hypervolume.

    For an even number of seeds, this is the upper median, since a seed may never reach the goal.
    """
    found = _shares(ours, goal, allowance)
    reached = [f for f in found if f is not None]
    if not found:
        return ""
    if len(reached) <= len(found) / 2:
        return f"{len(reached)} of {len(found)} seeds"
    ordered = sorted(f if f is not None else float("inf") for f in found)
    share = 100 * ordered[len(ordered) // 2]
    return f"{share:.0f} %" + ("" if None not in found else f" ({len(reached)} of {len(found)})")


def table(runs: Sequence[Run], plan: Mapping[str, Any]) -> str:
    """Format a table with the hypervolume, the lead of the default and other figures by method."""
    allowance, default, goal = plan["allowance"], plan["default"], plan["goal"]
    methods = by_method(runs, list(plan["methods"]))
    lines = [
        f"| method | seeds | hypervolume, test | lead of `{default}` (95 %) | samples to reach "
        f"`{goal}` | trials | samples per trial | seconds per trial |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in methods.items():
        volumes = [volume(run, allowance) for run in seeds.values()]
        points = [p for run in seeds.values() for p in kept(run, allowance)]
        if not points:  # for example if the sensitivity scores used up the allowance
            lines.append(f"| {name} | {len(seeds)} | no trial | | | 0 | | |")
            continue
        lead = ""
        if name != default and default in methods:
            lead = _difference(methods[default], seeds, allowance)
        reach = _reach(seeds, methods[goal], allowance) if goal in methods else ""
        lines.append(
            f"| {name} | {len(seeds)} | {statistics.fmean(volumes):.4f} | {lead} | {reach} | "
            f"{len(points) / len(seeds):.1f} | "
            f"{statistics.fmean(p['samples'] for p in points):,.0f} | "
            f"{statistics.fmean(p['seconds'] for p in points):.1f} |"
        )
    return "\n".join(lines)


def accuracies(runs: Sequence[Run], plan: Mapping[str, Any]) -> str:
    """Format a table of the test metric, in percent, of the best point within each budget."""
    methods = by_method(runs, list(plan["methods"]))
    budgets = {label: cost for run in runs for label, cost in run["budgets"].items()}
    ordered = sorted(budgets, key=lambda label: -budgets[label])
    lines = [
        "| method | " + " | ".join(ordered) + " |",
        "|---" * (len(ordered) + 1) + "|",
    ]
    for name, seeds in methods.items():
        cells = []
        for label in ordered:
            found = [accuracy_at(run, budgets[label], plan["allowance"]) for run in seeds.values()]
            values = [100 * value for value in found if value is not None]
            cells.append(f"{statistics.fmean(values):.2f}" if len(values) == len(found) else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(runs: Sequence[Run], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers in the tables by method, and within each method by seed or budget."""
    allowance, default, goal = plan["allowance"], plan["default"], plan["goal"]
    methods, found = by_method(runs, list(plan["methods"])), {}
    for name, seeds in methods.items():
        points = [p for run in seeds.values() for p in kept(run, allowance)]
        budgets = next(iter(seeds.values()))["budgets"]
        leads = []
        if name != default and default in methods:
            leads = _differences(methods[default], seeds, allowance)
        found[name] = {
            "hypervolume": {str(seed): volume(run, allowance) for seed, run in seeds.items()},
            "lead_of_default": bootstrap(leads) if len(leads) > 1 else leads,
            "share_to_reach_goal": _shares(seeds, methods.get(goal, {}), allowance),
            "metric_within_budget": {
                label: [accuracy_at(run, cost, allowance) for run in seeds.values()]
                for label, cost in budgets.items()
            },
            "trials": len(points) / len(seeds),
            "samples_a_trial": statistics.fmean(p["samples"] for p in points) if points else None,
            "seconds_a_trial": statistics.fmean(p["seconds"] for p in points) if points else None,
        }
    return {"allowance": allowance, "default": default, "goal": goal, "methods": found}


def plot(runs: Sequence[Run], plan: Mapping[str, Any], file: Path) -> None:
    """Plot the mean test hypervolume against the processed samples, with one line per method.

    Args:
        runs: results of all methods and seeds.
        plan: the plan.
        file: the SVG file.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "front"
    allowance = plan["allowance"]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, seeds in by_method(runs, list(plan["methods"])).items():
        curves = [curve(run, allowance) for run in seeds.values()]
        ends = sorted({s for c in curves for s, _ in c})
        means = [
            statistics.fmean(next((v for s, v in reversed(c) if s <= end), 0.0) for c in curves)
            for end in ends
        ]
        style = "-" if name in (plan["default"], plan["goal"]) else "--"
        axes.step(ends, means, style, where="post", label=name, linewidth=1.4)
    axes.set_xlabel("training samples, everything counted")
    axes.set_ylabel("hypervolume on test")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
