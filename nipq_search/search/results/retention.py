"""Deletion of models and checkpoints that are no longer needed (`gc`)."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nipq_search import blobs
from nipq_search.records import SCHEMA, TrialRecord
from nipq_search.search import jobs
from nipq_search.search.config.sweep_config import SweepConfig, parse_config
from nipq_search.search.jobs import job_folder
from nipq_search.search.jobs.lease import check_free, driver_lease
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.strategies.pareto import non_dominated
from nipq_search.search.strategies.strategies import STRATEGIES, FinishedTrial
from nipq_search.search.study.database_lease import study_lease

_OPEN = ("RUNNING", "WAITING")


def needed(
    records: Sequence[TrialRecord],
    config: SweepConfig,
    mode: str,
    budgets: Sequence[Mapping[str, float]] = (),
) -> dict[int, str]:
    """Find the trials whose models are still needed.

    These are the trials on the front; the parents of trials that are open or on the front, which
    are needed to continue or replay them; the trials that `best` returns for a budget or for a
    limit on a budget's cost; and, with a strategy that uses warm starts, the trials that a further
    trial could start from.

    Args:
        records: records of all trials.
        config: the sweep configuration.
        mode: direction of the metric, `max` or `min`.
        budgets: absolute targets of the sweep's budgets, including budgets without trials.

    Returns:
        The reason for keeping each trial's model, by trial number.
    """
    found = {r.trial: "on the front" for r in records if r.on_front}
    for record in records:
        if record.parent is not None and (record.state in _OPEN or record.trial in found):
            what = "an open trial" if record.state in _OPEN else "a trial on the front"
            found.setdefault(record.parent, f"parent of {what} ({record.trial})")
    sign = 1 if mode == "max" else -1
    finished = [
        FinishedTrial(
            number=r.trial, cost=r.cost, metric=sign * (r.validation or 0.0), targets=r.budget
        )
        for r in records
        if r.state == jobs.COMPLETE and r.cost
    ]
    strategy = STRATEGIES[config.search.strategy]()
    targets = [dict(r.budget) for r in records] + [dict(budget) for budget in budgets]
    names = {name for target in targets for name in target}
    for number, why in _best_trials(finished, targets, names).items():
        found.setdefault(number, why)
    for costs in [*(dict(trial.cost) for trial in finished), *targets]:
        limited = {name: value for name, value in costs.items() if name in names}
        for target in [limited, *({name: value} for name, value in limited.items())]:
            if target and (parent := strategy.parent(target, finished)) is not None:
                found.setdefault(parent, "the start of a further trial")
    return found


def _best_trials(
    finished: Sequence[FinishedTrial],
    targets: Sequence[Mapping[str, float]],
    names: Collection[str],
) -> dict[int, str]:
    """Find the trials that `best` returns for limits on one cost or on a budget's costs.

    Returns:
        The reason for keeping each trial's model, by trial number.
    """
    found: dict[int, str] = {}
    for name in sorted(names):
        points = {t.number: (t.metric, t.cost[name]) for t in finished if name in t.cost}
        found |= dict.fromkeys(non_dominated(points, "max"), f"the best for a limit on {name}")
    for limits in targets:
        inside = [t for t in finished if all(t.cost.get(n, 0) <= v for n, v in limits.items())]
        if limits and inside:
            best = max(inside, key=lambda t: (t.metric, -t.number))
            found.setdefault(best.number, "the best within a budget")
    return found


def collect(out: Path, dry_run: bool = False) -> dict[str, Any]:
    """Delete models and checkpoints that are no longer needed; keep records, curves and logs.

    Args:
        out: the sweep's folder.
        dry_run: only list what would be deleted.

    Returns:
        The document of `gc --json`. `freed` lists each path that was or would be deleted, with its
        size in bytes and its trial (None for the float model and baselines). `bytes` is the total
        size, and `kept` lists the trials whose models remain, with the reasons.

    Raises:
        UserError: the folder is not a sweep, or a driver is running it.
        RuntimeError: a file or object could not be deleted.
    """
    sweep = Sweep.open(out)
    config = parse_config(dict(sweep.config))
    with contextlib.ExitStack() as held:
        if dry_run:
            check_free(sweep.folder)
        else:
            token = held.enter_context(driver_lease(sweep.folder))
            held.enter_context(study_lease(config.name, token))
        records = sweep.trials()
        budgets = [budget["targets"] for budget in sweep.facts["budgets"]]
        kept = needed(records, config, sweep.facts["mode"], budgets)
        garbage: list[tuple[int | None, Path]] = [
            (None, path) for path in _initial_garbage(sweep.folder)
        ]
        for record in records:
            folder = job_folder(sweep.folder, "trial", record.trial)
            found = _garbage(folder, record, record.trial in kept)
            garbage += [(record.trial, path) for path in found]
        freed = []
        for trial, path in garbage:
            size, shown = blobs.size_of(path), str(path.relative_to(sweep.folder))
            freed.append({"trial": trial, "path": shown, "bytes": size})
            if not dry_run and not blobs.remove(path):
                raise RuntimeError(
                    f"{path}: could not be deleted, locally or in the object store; fix the "
                    "permissions or the store, then run the same command again"
                )
    return {
        "schema": SCHEMA,
        "dry_run": dry_run,
        "bytes": sum(entry["bytes"] for entry in freed),
        "freed": freed,
        "kept": [{"trial": number, "why": why} for number, why in sorted(kept.items())],
    }


def _garbage(folder: Path, record: TrialRecord, kept: bool) -> list[Path]:
    """List the paths in a trial's folder that can be deleted."""
    if record.state in _OPEN:
        return []
    checkpoints = folder / "checkpoints"
    models = jobs.model_files(folder, obsolete=kept)
    return [checkpoints, *models] if checkpoints.is_dir() else models


def _initial_garbage(out: Path) -> list[Path]:
    """List the paths that an interrupted cleanup left in the float model's or a baseline's folder.

    Only jobs with a committed record are considered, because the others may still resume.
    """
    folders = [out / "float", *sorted((out / "baselines").glob("*"))]
    done = [folder for folder in folders if jobs.committed_record(folder) is not None]
    checkpoints = [folder / "checkpoints" for folder in done]
    spare = [model for folder in done for model in jobs.model_files(folder, obsolete=True)]
    return [path for path in checkpoints if path.is_dir()] + spare
