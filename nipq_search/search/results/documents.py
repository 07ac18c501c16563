"""Trial records, and the documents that `front --json` and `status --json` print.

Everything here is derived from the resolved sweep, the ledger's trials and the jobs' folders.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from nipq_search.cost import CONVENTION
from nipq_search.file_io import read_sealed
from nipq_search.records import SCHEMA, Baseline, TrialRecord
from nipq_search.search import jobs
from nipq_search.search.jobs import TEST_FILE, committed_record, job_folder
from nipq_search.search.strategies.pareto import default_reference, hypervolume, non_dominated
from nipq_search.search.strategies.unseen_trials import UnseenTrials, is_foreign
from nipq_search.search.study.ledger import BUDGET

ENDED_STATES = ("COMPLETE", "PRUNED", "FAIL")
STATES = (*ENDED_STATES, "RUNNING", "WAITING")


def test_metric(folder: Path, metric: str) -> float | None:
    """Return a job's metric on the test split, or None if it was not evaluated there."""
    document = read_sealed(folder / TEST_FILE)
    return None if document is None else document["metrics"].get(metric)


def _prefixed(attributes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in attributes.items() if k.startswith(prefix)}


class Records:
    """Records of a study's trials, updated incrementally: unchanged records are reused.

    Args:
        facts: the sweep's resolved facts, `ResolvedSweep.as_json()`.
        out: the sweep's folder.

    Attributes:
        states: number of ended trials by state.
        best: validation metric and front cost of the best trial, by budget label.
    """

    def __init__(self, facts: Mapping[str, Any], out: Path) -> None:
        """Start without records."""
        self._facts, self._out = facts, out
        self._unseen = UnseenTrials()
        self._records: list[TrialRecord] = []
        self._points: dict[int, tuple[float, float]] = {}
        self.states: dict[str, int] = {}
        self.best: dict[str, tuple[float, float]] = {}

    @property
    def front(self) -> set[int]:
        """Numbers of the trials on the Pareto front."""
        return set(self._points)

    def update(self, trials: Sequence[FrozenTrial], running: bool = True) -> list[TrialRecord]:
        """Update the records, `front`, `states` and `best`, and return one record per trial.

        Args:
            trials: all trials of the study, ordered by number.
            running: whether to also update unfinished trials whose state has not changed.
        """
        changed = self._unseen.take(trials)
        # A dominated trial stays dominated, so only the front and the new trials are candidates.
        points = dict(self._points)
        for trial in changed:
            if trial.state is TrialState.COMPLETE and not is_foreign(trial):
                points[trial.number] = (trial.values[0], trial.values[1])
        front = non_dominated(points, self._facts["mode"])
        for number in self._points.keys() - front:
            self._records[number] = dataclasses.replace(self._records[number], on_front=False)
        self._points = {number: points[number] for number in front}
        for trial in changed:
            if trial.number == len(self._records):
                self._records.append(self._record(trial))
            elif running or self._records[trial.number].state != trial.state.name:
                self._records[trial.number] = self._record(trial)
            if trial.state.is_finished():
                self._count(self._records[trial.number])
        return list(self._records)

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        return _record(trial, self._facts, self._out, trial.number in self._points)

    def _count(self, record: TrialRecord) -> None:
        self.states[record.state] = self.states.get(record.state, 0) + 1
        cost = record.cost.get(self._facts["front_cost"])
        if record.state == "COMPLETE" and record.validation is not None and cost is not None:
            sign = 1 if self._facts["mode"] == "max" else -1
            best = self.best.get(record.budget_label)
            if best is None or sign * record.validation > sign * best[0]:
                self.best[record.budget_label] = (record.validation, cost)


def _record(
    trial: FrozenTrial, facts: Mapping[str, Any], out: Path, on_front: bool
) -> TrialRecord:
    attributes: Mapping[str, Any] = {} if is_foreign(trial) else trial.user_attrs
    value = trial.values[0] if trial.state is TrialState.COMPLETE else None
    folder = job_folder(out, "trial", trial.number)
    tries = jobs.attempts(folder)
    finished = trial.state.is_finished()
    # The ledger stores samples and seconds only for finished trials; for others, read the folder.
    in_ledger = finished and "samples" in attributes and "seconds" in attributes
    targets = {
        name: value
        for name, value in _prefixed(attributes, "budget_").items()
        if name in facts["costs"]
    }
    return TrialRecord(
        trial=trial.number,
        state=trial.state.name,
        reason=attributes.get("reason"),
        budget_label=attributes.get("budget", ""),
        budget=targets,
        params={k: v for k, v in trial.params.items() if k != BUDGET},
        validation=value if value is not None and math.isfinite(value) else None,
        test=test_metric(folder, facts["metric"]),
        metrics=_prefixed(attributes, "validation_"),
        cost=_prefixed(attributes, "cost_"),
        on_front=on_front,
        samples=attributes["samples"] if in_ledger else jobs.samples_processed(folder),
        seconds=attributes["seconds"] if in_ledger else jobs.seconds_spent(folder),
        parent=attributes.get("parent"),
        attempts=attributes.get("attempts", len(tries)),
        seed=attributes.get("seed", 0),
        threads=attributes.get("threads", 1),
        started=jobs.first_start(folder),
        ended=attributes.get("ended") if finished else None,
        strategy=attributes.get("strategy", ""),
        folder=str(tries[-1].relative_to(out)) if tries else None,
    )


def baselines(bits: Sequence[int], metric: str, out: Path) -> list[Baseline]:
    """Return the records of the uniform LSQ models that have been trained successfully.

    Args:
        bits: configured bit-widths of the baselines.
        metric: name of the task's metric.
        out: the sweep's folder.

    Returns:
        One record per COMPLETE baseline.
    """
    found = []
    for width in bits:
        folder = job_folder(out, "baseline", width)
        record = committed_record(folder)
        if record is None or record["state"] != jobs.COMPLETE:
            continue
        found.append(
            Baseline(
                bits=width,
                validation=record["metrics"].get(metric),
                test=test_metric(folder, metric),
                cost=record["cost"],
                samples=record["samples"],
                seconds=record["seconds"],
            )
        )
    return found


def samples_by_job(out: Path) -> dict[Path, int]:
    """Return the number of training samples processed by each job, by job folder.

    Failed and repeated attempts are included.
    """
    folders = [job_folder(out, kind, 0) for kind in ("float", jobs.SCORES)]
    for parent in (out / "baselines", out / "trials"):
        folders += [parent / name for name in os.listdir(parent)] if parent.is_dir() else []
    return {folder: jobs.samples_processed(folder) for folder in folders}


def total_samples(out: Path) -> int:
    """Return the number of training samples processed by the whole sweep.

    Failed and repeated attempts are included.
    """
    return sum(samples_by_job(out).values())


def front_document(
    records: Sequence[TrialRecord],
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Build the document of `front --json`: all COMPLETE trials, baselines and hypervolumes.

    Args:
        records: records of all trials.
        facts: the sweep's resolved facts, `ResolvedSweep.as_json()`.
        config: the resolved configuration.
        out: the sweep's folder.

    Returns:
        The document; its points are sorted by the front cost, cheapest first.
    """
    metric, mode, cost = facts["metric"], facts["mode"], facts["front_cost"]
    folder = job_folder(out, "float", 0)
    record = committed_record(folder) or {}
    floats = {
        "validation": record.get("metrics", {}).get(metric),
        "test": test_metric(folder, metric),
        "cost": {name: values["float"] for name, values in facts["costs"].items()},
    }
    complete = sorted(
        (r for r in records if r.state == "COMPLETE" and cost in r.cost),
        key=lambda r: (r.cost[cost], r.trial),
    )
    points: list[dict[str, Any]] = [
        {
            "trial": r.trial,
            "on_front": r.on_front,
            "budget_label": r.budget_label,
            "budget": dict(r.budget),
            "cost": dict(r.cost),
            "validation": r.validation,
            "test": r.test if r.on_front else None,
            "samples": r.samples,
            "seconds": r.seconds,
            "parent": r.parent,
        }
        for r in complete
    ]
    given = config["search"].get("reference")
    volumes: dict[str, float | None] = {}
    references: dict[str, float | None] = {}
    for split in ("validation", "test"):
        best = floats[split]
        references[split] = None
        volumes[split] = None
        chosen = [p for p in points if p["on_front"]]
        if best is None or any(p[split] is None for p in chosen):
            continue
        references[split] = default_reference(best, mode) if given is None else given
        volumes[split] = hypervolume(
            [(p[split], p["cost"][cost]) for p in chosen],
            axis=(facts["axis"][0], facts["axis"][1]),
            reference=float(references[split] or 0.0),
            best=best,
            mode=mode,
        )
    return {
        "schema": SCHEMA,
        "sweep": config["name"],
        "metric": {"name": metric, "mode": mode},
        "bops_convention": CONVENTION,
        "front_cost": cost,
        "hypervolume": volumes["validation"],
        "test_hypervolume": volumes["test"],
        "reference": {
            "metric": references["validation"],
            "test_metric": references["test"],
            "least_cost": facts["axis"][0],
            "uniform8_cost": facts["axis"][1],
        },
        "total_samples": total_samples(out),
        "float": floats,
        "baselines": [
            {
                "bits": b.bits,
                "validation": b.validation,
                "test": b.test,
                "cost": dict(b.cost),
                "samples": b.samples,
                "seconds": b.seconds,
            }
            for b in baselines(config["search"]["baselines"], metric, out)
        ],
        "points": points,
    }


def _stage(
    states: Mapping[str, int], driver: Any, config: Mapping[str, Any], out: Path
) -> str | None:
    """Return the name of a running sweep's stage, or None if no driver is running."""
    if driver is None:
        return None
    if committed_record(job_folder(out, "float", 0)) is None:
        return "float model"
    if (out / jobs.SCORES).is_dir() and committed_record(job_folder(out, jobs.SCORES, 0)) is None:
        return "sensitivity scores"
    widths = config["search"]["baselines"]
    if any(committed_record(job_folder(out, "baseline", bits)) is None for bits in widths):
        return "baselines"
    return "trials" if states["RUNNING"] else "test split"


def status_document(
    records: Sequence[TrialRecord], config: Mapping[str, Any], driver: Any, out: Path
) -> dict[str, Any]:
    """Build the document of `status --json`: the stage, and the state and progress of each trial.

    Args:
        records: records of all trials.
        config: the resolved configuration.
        driver: `host` and `pid` of the running driver, or None.
        out: the sweep's folder.

    Returns:
        The document.
    """
    states = dict.fromkeys(STATES, 0)
    rows = []
    for record in records:
        states[record.state] += 1
        progress: dict[str, Any] = {}
        if record.folder is not None:
            progress = jobs.read_json_object(out / record.folder / jobs.PROGRESS)
        rows.append(
            {
                "trial": record.trial,
                "state": record.state,
                "budget_label": record.budget_label,
                "reason": record.reason,
                "folder": record.folder,
                "epoch": progress.get("epoch"),
                "seconds": record.seconds,
            }
        )
    return {
        "schema": SCHEMA,
        "sweep": config["name"],
        "states": states,
        "driver": driver,
        "stage": _stage(states, driver, config, out),
        "total": max(config["search"]["trials"], len(records)),
        "total_samples": total_samples(out),
        "trials": rows,
    }
