"""What a sweep and its trials look like in MLflow: pure functions from records to plain values.

Nothing here talks to a server. Keys are cleaned to what MLflow accepts and values cut to what
every one of its stores can hold.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nipq_search.records import CurvePoint, TrialRecord

PARAM_LIMIT = 500
"""Characters of a param's value that every store holds."""
TAG_LIMIT = 5000
"""Characters of a tag's value that every store holds."""
KEY_LIMIT = 250
"""Characters of a key."""

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED", "FAIL": "FAILED", "RUNNING": "RUNNING"}
"""MLflow's run status by trial state. A trial that waits has no run."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric value: its key, its step (an epoch, or 0 for a final figure), when, and what.

    `timestamp` is Unix time in milliseconds, as MLflow has it.
    """

    key: str
    step: int
    timestamp: int
    value: float


def clean_key(name: str) -> str:
    """`name` with every character that MLflow refuses in a key replaced by `_`.

    Slashes go too: MLflow refuses keys that look like paths such as `a//b` or `../a`.
    """
    key = re.sub(r"[^\w\-. :]", "_", name)[:KEY_LIMIT]
    return key if key.strip(". ") else "_"


def milliseconds(seconds: float) -> int:
    """Unix time in seconds as MLflow's milliseconds."""
    return round(seconds * 1000)


def value_text(value: Any, limit: int = PARAM_LIMIT) -> str:
    """`value` as a param or tag: text as it is, anything else as JSON, cut to `limit`."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as flat params: `{"train": {"epochs": 4}}` gives `train.epochs`.

    Lists of mappings are numbered (`budgets.0.bops`); lists of plain values are JSON text.
    """
    flat: dict[str, str] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{key}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
            flat |= flatten({str(number): item for number, item in enumerate(value)}, f"{key}.")
        else:
            flat[clean_key(key)] = value_text(value)
    return flat


def run_name(trial: TrialRecord) -> str:
    """A name that reads well in a list and sorts by number: `trial-003 bops: uniform 4`."""
    return f"trial-{trial.trial:03d} {trial.budget_label}".strip()[:KEY_LIMIT]


def trial_params(trial: TrialRecord) -> dict[str, str]:
    """Params of a trial's run: its hyperparameters, and what they were drawn for."""
    params = {clean_key(name): value_text(value) for name, value in trial.params.items()}
    return params | {"budget": value_text(trial.budget_label), "seed": str(trial.seed)}


def trial_tags(trial: TrialRecord) -> dict[str, str]:
    """Tags of a trial's run. `on_front` is apart, because it changes with other trials."""
    tags = {
        "nipq.trial": str(trial.trial),
        "nipq.state": trial.state,
        "nipq.attempts": str(trial.attempts),
        "budget": trial.budget_label,
        "strategy": trial.strategy,
    }
    if "lambda" in trial.params:
        tags["lambda"] = value_text(trial.params["lambda"])
    if trial.reason is not None:
        tags["reason"] = trial.reason
    if trial.parent is not None:
        tags["nipq.parent"] = str(trial.parent)
    return {key: value_text(value, TAG_LIMIT) for key, value in tags.items()}


def trial_rows(trial: TrialRecord, curve: Sequence[CurvePoint]) -> list[Row]:
    """Metric rows of a trial's run, one per (key, step): its curve, then its final figures.

    Epochs count as steps. Final figures stand at step 0 and exist once the trial has ended:
    `validation`, `test`, `metrics_<name>`, `cost_<name>`, `samples`, `seconds`.
    """
    rows: dict[tuple[str, int], Row] = {}
    for point in sorted(curve, key=lambda point: (point.epoch, point.timestamp)):
        when = milliseconds(point.timestamp)
        for name, value in point.metrics.items():
            row = Row(key=clean_key(name), step=point.epoch, timestamp=when, value=float(value))
            rows.setdefault((row.key, row.step), row)
    if trial.ended is not None and trial.state in ("COMPLETE", "PRUNED", "FAIL"):
        final: dict[str, float | None] = {"validation": trial.validation, "test": trial.test}
        final |= {f"metrics_{name}": value for name, value in trial.metrics.items()}
        final |= {f"cost_{name}": value for name, value in trial.cost.items()}
        final |= {"samples": trial.samples, "seconds": trial.seconds}
        when = milliseconds(trial.ended)
        for name, figure in final.items():
            if figure is not None:
                row = Row(key=clean_key(name), step=0, timestamp=when, value=float(figure))
                rows.setdefault((row.key, row.step), row)
    return list(rows.values())


def fingerprint(*parts: Any) -> str:
    """A short digest of plain values, to recognize what a server already holds."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def chunks(rows: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """`rows` in pieces of at most `size`."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
