"""The attempts of a job: each start has a folder of its own below the job's.

What an attempt did is final once `result.json` is there, whole, with the model beside it. Nothing
is reported before that. An attempt ends with its own `result.json`, or with one by which the next
attempt takes the job over. There is room for one, so a process that comes back late
changes nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nipq_search import blobs, storage
from nipq_search.records import CurvePoint
from nipq_search.search.jobs.job import Job
from nipq_search.search.jobs.paths import (
    CURVE,
    HANG,
    LOST,
    PROGRESS,
    RESULT,
    STARTED,
    STOPPED,
    rung_file,
)
from nipq_search.train.models import MODEL_FILE

HANGS_ALLOWED = 2
NODE = "node"
"""Cause of an attempt's end that is never the job's fault; see `worker.failures`."""
_TAKEN_OVER = {"state": "TAKEN_OVER"}


def have_begun(out: Path) -> bool:
    """Whether any job of a sweep was ever started."""
    return any(out.glob("*/attempt-*")) or any(out.glob("*/*/attempt-*"))


def attempts(folder: Path) -> list[Path]:
    """Attempt folders of a job, first to last."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if re.fullmatch(r"attempt-[1-9][0-9]*", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("attempt-")))


def noted(path: Path) -> dict[str, Any]:
    """A document of an attempt; empty where it is missing, torn, or somebody's own."""
    document = storage.read_json(path)
    return document if isinstance(document, dict) else {}


def _number(document: Mapping[str, Any], key: str) -> float | None:
    """A number of a document, if it is one."""
    value = document.get(key)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def committed(folder: Path) -> dict[str, Any] | None:
    """The result record of a job, if one of its attempts committed it whole."""
    for attempt in reversed(attempts(folder)):
        if (record := storage.read_sealed(attempt / RESULT)) is not None:
            return record
    return None


def model_file(folder: Path) -> Path:
    """Where the trained model of a job lies, if it is there: beside the record that counts."""
    for attempt in reversed(attempts(folder)):
        if storage.read_sealed(attempt / RESULT) is not None:
            return attempt / MODEL_FILE
    return folder / "attempt-1" / MODEL_FILE


def models(folder: Path, *, spare: bool = False) -> list[Path]:
    """Models of all attempts; or only those that a whole record says are not the job's.

    An attempt that was killed before its record leaves one, and one that came too late.
    """
    found = [attempt / MODEL_FILE for attempt in attempts(folder)]
    if spare:
        counts = model_file(folder) if committed(folder) else None
        found = [model for model in found if counts not in (None, model)]
    return [model for model in found if blobs.exists(model)]


def note_rung(folder: Path, rung: int, measured: dict[str, Any]) -> None:
    """Write down what a trial measured at a rung; the first whole record stays."""
    file = rung_file(folder, rung)
    if not storage.seal_once(file, measured) and storage.read_sealed(file) is None:
        storage.write_sealed(file, measured)


def rungs(folder: Path) -> list[dict[str, Any]]:
    """What a trial measured at its rungs, first to last: `metrics`, and the `samples` it took."""
    found: list[dict[str, Any]] = []
    while (record := storage.read_sealed(rung_file(folder, len(found)))) is not None:
        found.append(record)
    return found


def basis(folder: Path) -> dict[str, Any]:
    """Threads, workers and parent with which a job's last attempt trained; empty for none."""
    keys = ("threads", "workers", "parent")
    for attempt in reversed(attempts(folder)):
        started = noted(attempt / STARTED)
        if all(key in started for key in keys):
            return {key: started[key] for key in keys}
    return {}


class Committed(Exception):
    """An attempt has finished the job meanwhile."""


def open_attempt(job: Job, node: str | None = None, **more: Any) -> Path:
    """Make the next attempt's folder; the name can be taken only once.

    From here on earlier attempts are superseded: one whose process was only out of reach ends, and
    can commit nothing. `more` is what else `started.json` is to say.

    Raises:
        Committed: an earlier attempt was faster; a `test` job is run again all the same.
    """
    while True:
        earlier = attempts(job.folder)
        if earlier and not _close(earlier[-1]) and job.kind != "test":
            raise Committed
        last = int(earlier[-1].name.removeprefix("attempt-")) if earlier else 0
        folder = job.folder / f"attempt-{last + 1}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        storage.write_json(
            folder / STARTED,
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "node": node,
                "run": job.run,
                "time": time.time(),
                **more,
            },
        )
        return folder


def hangs(folder: Path) -> int:
    """Attempts of a job that were killed because they took too long."""
    return sum(1 for attempt in attempts(folder) if _hung(attempt))


def _hung(attempt: Path) -> bool:
    marker = attempt / HANG
    return marker.exists() and marker.stat().st_size > 0


def _close(attempt: Path) -> bool:
    """Take the place of an attempt's record; whether it has none, and will never have one."""
    file = attempt / RESULT
    closed = storage.write_once(file, storage.as_json(_TAKEN_OVER))
    return closed or storage.read_sealed(file) is None  # closed before, or damaged


def superseded(attempt: Path) -> bool:
    """Whether the job of an attempt without a record was given to a later one."""
    return (attempt / RESULT).exists()


def _has_ended(attempt: Path) -> bool:
    """Whether an attempt left an end of its own, be it damaged."""
    if (attempt / STOPPED).exists() or _hung(attempt):
        return True
    return (attempt / RESULT).exists() and storage.read_json(attempt / RESULT) != _TAKEN_OVER


def silent_attempts(folder: Path, run: str) -> list[tuple[Path, dict[str, Any]]]:
    """Attempts of this driver's run that left no end, with their `started.json`.

    Attempts of earlier runs died with their driver, which is not the trial's fault.
    """
    found = []
    for attempt in attempts(folder):
        started = noted(attempt / STARTED)
        if started.get("run") == run and not _has_ended(attempt):
            found.append((attempt, started))
    return found


def crashes(folder: Path, run: str) -> list[str]:
    """Causes of the silent attempts, as far as the job may be to blame: dead nodes apart."""
    found = [cause_of(attempt) or "process" for attempt, _ in silent_attempts(folder, run)]
    return [cause for cause in found if cause != NODE]


def note_cause(attempt: Path, cause: str, detail: str) -> None:
    """Write down why an attempt left no end; see `nipq_search.search.worker.failures`."""
    storage.write_json(attempt / LOST, {"cause": cause, "detail": detail, "time": time.time()})


def cause_of(attempt: Path) -> str | None:
    """What `note_cause` wrote."""
    return noted(attempt / LOST).get("cause")


def lost_at(attempt: Path) -> float:
    """When `note_cause` wrote it, Unix time; 0 where it did not."""
    return _number(noted(attempt / LOST), "time") or 0.0


def live_attempt(folder: Path, run: str) -> dict[str, Any] | None:
    """`started.json` of the attempt that runs now as far as files tell, with its folder."""
    for attempt in reversed(attempts(folder)):
        ended = any((attempt / name).exists() for name in (RESULT, STOPPED, LOST))
        started = noted(attempt / STARTED)
        if ended or _hung(attempt) or started.get("run") != run:
            return None
        return {**started, "folder": str(attempt)}
    return None


def commit(attempt: Path, record: dict[str, Any]) -> bool:
    """Write the result record: from here on the job is done.

    Returns:
        False where a later attempt has taken the job over; nothing is written then.
    """
    return storage.seal_once(attempt / RESULT, record)


def samples_processed(folder: Path) -> int:
    """Training samples that all attempts of a job processed, repeated ones included."""
    return sum(int(_number(noted(a / PROGRESS), "samples") or 0) for a in attempts(folder))


def seconds_spent(folder: Path) -> float:
    """Wall time of all attempts of a job, up to their last sign of life."""
    total = 0.0
    for attempt in attempts(folder):
        started, progress = (_number(noted(attempt / f), "time") for f in (STARTED, PROGRESS))
        if started is not None and progress is not None:
            total += max(0.0, progress - started)
    return total


def first_start(folder: Path) -> float | None:
    """Unix time of a job's first attempt."""
    times = [_number(noted(attempt / STARTED), "time") for attempt in attempts(folder)]
    return min((t for t in times if t is not None), default=None)


def curve(folder: Path) -> list[CurvePoint]:
    """The learning curve over all attempts; an epoch that was run again counts once."""
    points: dict[int, CurvePoint] = {}
    for attempt in attempts(folder):
        try:
            lines = (attempt / CURVE).read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            try:
                point = CurvePoint(**json.loads(line))
            except (ValueError, TypeError):
                continue  # a line torn by a kill
            if isinstance(point.epoch, int) and isinstance(point.metrics, dict):
                points.setdefault(point.epoch, point)
    return [points[epoch] for epoch in sorted(points)]
