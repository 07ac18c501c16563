"""The view of a sweep and its trials in MLflow, as pure functions from records to plain values.

Keys are restricted to the characters that MLflow accepts, and values are truncated to lengths that
all of MLflow's stores accept. No function here accesses a server.
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
"""Maximum number of characters in the value of a param."""
TAG_LIMIT = 5000
"""Maximum number of characters in the value of a tag."""
KEY_LIMIT = 250
"""Maximum number of characters in a key."""

STATUS = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED", "FAIL": "FAILED", "RUNNING": "RUNNING"}
"""MLflow run status by trial state. A waiting trial has no run."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric value.

    Attributes:
        key: name of the metric.
        step: the epoch, or 0 for a final value.
        timestamp: Unix time in milliseconds.
        value: value of the metric.
    """

    key: str
    step: int
    timestamp: int
    value: float


def clean_key(name: str) -> str:
    """Replace every character that MLflow rejects in a key with `_`, and truncate the key.

    Slashes are replaced as well, because MLflow rejects keys such as `a//b` or `../a`. A key of
    nothing but dots and spaces becomes `_`.
    """
    key = re.sub(r"[^\w\-. :]", "_", name)[:KEY_LIMIT]
    return key if key.strip(". ") else "_"


def milliseconds(seconds: float) -> int:
    """Convert Unix time from seconds to milliseconds."""
    return round(seconds * 1000)


def value_text(value: Any, limit: int = PARAM_LIMIT) -> str:
    """Convert `value` to text for a param or tag: strings verbatim, other types as JSON.

    The text is truncated to `limit` characters.
    """
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a nested configuration: `{"train": {"epochs": 4}}` becomes the param `train.epochs`.

    Lists of mappings are numbered (`budgets.0.bops`); lists of plain values become JSON text.

    Args:
        config: the configuration.
        prefix: text that every key begins with.
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
    """Return the name of a trial's run, such as `trial-003 bops: uniform 4`.

    Sorted alphabetically, the names of trials up to 999 are in the order of their numbers.
    """
    return f"trial-{trial.trial:03d} {trial.budget_label}".strip()[:KEY_LIMIT]


def trial_params(trial: TrialRecord) -> dict[str, str]:
    """Return the params of a trial's run, by key: hyperparameters, budget label and seed."""
    params = {clean_key(name): value_text(value) for name, value in trial.params.items()}
    return params | {"budget": value_text(trial.budget_label), "seed": str(trial.seed)}


def trial_tags(trial: TrialRecord) -> dict[str, str]:
    """Return the tags of a trial's run, except `on_front`, which depends on other trials."""
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
    """Return the metric rows of a trial's run, one per (key, step).

    Values of the learning curve have the epoch as their step. A trial that has ended also has
    final values at step 0: `validation`, `test`, `metrics_<name>`, `cost_<name>`, `samples` and
    `seconds`.
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
        for name, number in final.items():
            if number is not None:
                row = Row(key=clean_key(name), step=0, timestamp=when, value=float(number))
                rows.setdefault((row.key, row.step), row)
    return list(rows.values())


def fingerprint(*parts: Any) -> str:
    """Return a short digest of plain values, for comparison with what a server already stores."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def chunks(rows: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """Yield consecutive pieces of `rows` with at most `size` elements each."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
