"""The attempts of a job, each with its own folder below the job's folder.

An attempt's result is final once its `result.json` is complete, with the model next to it; no
result is reported before that. An attempt is closed by its own `result.json`, or by the one that
the next attempt writes in its place when it takes the job over. Only one of these two files can be
created, so a process that continues after it was superseded cannot change the result.
"""

from __future__ import annotations

import enum
import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nipq_search import blobs, file_io
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

MAX_HANGS = 2
"""A job fails after this many attempts that exceeded their time limit."""


class Cause(enum.StrEnum):
    """Why an attempt was lost, as stored in `lost.json`."""

    NODE = "node"
    """Its node died, which never counts as a failure of the job."""

    MEMORY = "memory"
    """Its machine ran out of memory."""

    GPU_MEMORY = "gpu memory"
    """Its GPU ran out of memory."""

    PROCESS = "process"
    """Its process died for another reason."""


_TAKEN_OVER = {"state": "TAKEN_OVER"}


class AlreadyCommitted(Exception):
    """An earlier attempt committed a result, so no further attempt may start."""


# Folders and records


def any_attempt_exists(out: Path) -> bool:
    """Return whether any job in the sweep's folder `out` has an attempt."""
    return any(out.glob("*/attempt-*")) or any(out.glob("*/*/attempt-*"))


def attempts(folder: Path) -> list[Path]:
    """Return the attempt folders of a job, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if re.fullmatch(r"attempt-[1-9][0-9]*", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("attempt-")))


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file contains none or is missing."""
    document = file_io.read_json(path)
    return document if isinstance(document, dict) else {}


def _number(document: Mapping[str, Any], key: str) -> float | None:
    """Return the value of a key if it is a finite number, otherwise None."""
    value = document.get(key)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def committed_record(folder: Path) -> dict[str, Any] | None:
    """Return the newest result record that an attempt of a job committed, or None."""
    for attempt in reversed(attempts(folder)):
        if (record := file_io.read_sealed(attempt / RESULT)) is not None:
            return record
    return None


def commit(attempt: Path, record: dict[str, Any]) -> bool:
    """Write the result record of an attempt, which finishes the job.

    Returns:
        Whether the record was written; False if a later attempt has taken the job over.
    """
    return file_io.seal_once(attempt / RESULT, record)


def model_file(folder: Path) -> Path:
    """Return the path of a job's trained model, next to its newest committed record.

    Without a record, this is a path in the first attempt's folder, where there may be no file.
    """
    for attempt in reversed(attempts(folder)):
        if file_io.read_sealed(attempt / RESULT) is not None:
            return attempt / MODEL_FILE
    return folder / "attempt-1" / MODEL_FILE


def model_files(folder: Path, *, obsolete: bool = False) -> list[Path]:
    """Return the paths of the models that the attempts of a job saved, oldest first.

    Args:
        folder: the job's folder.
        obsolete: return only models that do not belong to the committed record: those of attempts
            that were superseded, or killed before they wrote a record. Without a committed record,
            no model is obsolete.
    """
    found = [attempt / MODEL_FILE for attempt in attempts(folder)]
    if obsolete:
        current = model_file(folder) if committed_record(folder) else None
        found = [model for model in found if current not in (None, model)]
    return [model for model in found if blobs.exists(model)]


# Rungs


def record_rung(folder: Path, rung: int, measured: dict[str, Any]) -> None:
    """Write what a trial measured at a rung, unless an intact record exists.

    Args:
        folder: the trial's folder.
        rung: number of the rung, from 0.
        measured: `metrics`, and `samples`: the number of training samples used to estimate
            normalization statistics for this measurement.
    """
    file = rung_file(folder, rung)
    if not file_io.seal_once(file, measured) and file_io.read_sealed(file) is None:
        file_io.write_sealed(file, measured)


def rung_records(folder: Path) -> list[dict[str, Any]]:
    """Return what a trial measured at its rungs, in order; see `record_rung`.

    The list ends before the first rung without an intact record.
    """
    found: list[dict[str, Any]] = []
    while (record := file_io.read_sealed(rung_file(folder, len(found)))) is not None:
        found.append(record)
    return found


# Starting an attempt


def training_setup(folder: Path) -> dict[str, Any]:
    """Return `threads`, `workers` and `parent` of the last attempt that recorded all three.

    The result is empty if no attempt of the job did.
    """
    keys = ("threads", "workers", "parent")
    for attempt in reversed(attempts(folder)):
        started = read_json_object(attempt / STARTED)
        if all(key in started for key in keys):
            return {key: started[key] for key in keys}
    return {}


def open_attempt(job: Job, node: str | None = None, **more: Any) -> Path:
    """Supersede earlier attempts, and create the next attempt's folder with `started.json`.

    If the process of an earlier attempt is still running, for example on an unreachable node, it
    cannot commit, and it ends once it detects the new attempt. Only one process can create each
    folder.

    Args:
        job: the job.
        node: Ray's ID of the node on which the attempt runs; None outside Ray.
        more: further entries of `started.json`.

    Returns:
        The attempt's folder.

    Raises:
        AlreadyCommitted: an earlier attempt committed its result; never raised for a `test` job,
            which runs again whenever the front has changed.
    """
    while True:
        earlier = attempts(job.folder)
        if earlier and not _supersede(earlier[-1]) and job.kind != "test":
            raise AlreadyCommitted
        last = int(earlier[-1].name.removeprefix("attempt-")) if earlier else 0
        folder = job.folder / f"attempt-{last + 1}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        file_io.write_json(
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


def _supersede(attempt: Path) -> bool:
    """Prevent an attempt from committing; return False if it has already committed."""
    file = attempt / RESULT
    closed = file_io.write_once(file, file_io.as_json(_TAKEN_OVER))
    return closed or file_io.read_sealed(file) is None  # superseded earlier, or damaged


def is_superseded(attempt: Path) -> bool:
    """Return whether a later attempt has taken the job over.

    Call this only for an attempt that has not committed its own result.
    """
    return (attempt / RESULT).exists()


# How attempts ended


def count_hangs(folder: Path) -> int:
    """Count the attempts of a job that were killed because they exceeded their time limit."""
    return sum(1 for attempt in attempts(folder) if _hung(attempt))


def _hung(attempt: Path) -> bool:
    marker = attempt / HANG
    return marker.exists() and marker.stat().st_size > 0


def _has_ended(attempt: Path) -> bool:
    """Return whether an attempt's folder shows how it ended; a damaged record suffices."""
    if (attempt / STOPPED).exists() or _hung(attempt):
        return True
    return (attempt / RESULT).exists() and file_io.read_json(attempt / RESULT) != _TAKEN_OVER


def lost_attempts(folder: Path, run: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return the attempts of this driver's run that left no record of their end.

    Attempts of earlier runs are excluded: they were killed together with their driver, which does
    not count as a failure of the job.

    Args:
        folder: the job's folder.
        run: token of the driver's run.

    Returns:
        Pairs of an attempt's folder and its `started.json`, oldest first.
    """
    found = []
    for attempt in attempts(folder):
        started = read_json_object(attempt / STARTED)
        if started.get("run") == run and not _has_ended(attempt):
            found.append((attempt, started))
    return found


def crash_causes(folder: Path, run: str) -> list[Cause]:
    """Return the causes of a job's lost attempts, without `Cause.NODE`, which does not count.

    Only attempts of the driver's run `run` are considered. An attempt without a recorded cause
    counts as `Cause.PROCESS`.
    """
    found = [cause_of(attempt) or Cause.PROCESS for attempt, _ in lost_attempts(folder, run)]
    return [cause for cause in found if cause is not Cause.NODE]


def record_cause(attempt: Path, cause: Cause, detail: str) -> None:
    """Record why an attempt was lost.

    Args:
        attempt: the attempt's folder.
        cause: the cause, as `nipq_search.search.worker.failures` classifies it.
        detail: text of the error; empty if none is available.
    """
    file_io.write_json(attempt / LOST, {"cause": cause, "detail": detail, "time": time.time()})


def cause_of(attempt: Path) -> Cause | None:
    """Return the cause that `record_cause` wrote for an attempt, or None."""
    cause = read_json_object(attempt / LOST).get("cause")
    return Cause(cause) if cause in list(Cause) else None


def loss_recorded_at(attempt: Path) -> float:
    """Return the Unix time at which an attempt's loss was recorded; 0 if it was not recorded."""
    return _number(read_json_object(attempt / LOST), "time") or 0.0


def live_start(folder: Path, run: str) -> dict[str, Any] | None:
    """Return the content of a job's last `started.json`, or None unless that attempt is running.

    It is running if it belongs to the driver's run `run` and no file records its end. The added
    entry `folder` contains the path of the attempt's folder.
    """
    if not (found := attempts(folder)):
        return None
    attempt = found[-1]
    ended = any((attempt / name).exists() for name in (RESULT, STOPPED, LOST))
    started = read_json_object(attempt / STARTED)
    if ended or _hung(attempt) or started.get("run") != run:
        return None
    return {**started, "folder": str(attempt)}


# Totals over all attempts


def samples_processed(folder: Path) -> int:
    """Return how many training samples a job's attempts processed, including repeated ones."""
    found = (_number(read_json_object(a / PROGRESS), "samples") for a in attempts(folder))
    return sum(int(samples or 0) for samples in found)


def seconds_spent(folder: Path) -> float:
    """Return how many seconds a job's attempts took, each up to its last progress report."""
    total = 0.0
    for attempt in attempts(folder):
        started = _number(read_json_object(attempt / STARTED), "time")
        reported = _number(read_json_object(attempt / PROGRESS), "time")
        if started is not None and reported is not None:
            total += max(0.0, reported - started)
    return total


def first_start(folder: Path) -> float | None:
    """Return the Unix time at which a job's first attempt started; None if none has started."""
    times = [_number(read_json_object(attempt / STARTED), "time") for attempt in attempts(folder)]
    return min((t for t in times if t is not None), default=None)


def curve(folder: Path) -> list[CurvePoint]:
    """Return a job's learning curve, ordered by epoch.

    If several attempts measured the same epoch, the first measurement counts.
    """
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
                continue  # a line left incomplete when the process was killed
            if isinstance(point.epoch, int) and isinstance(point.metrics, dict):
                points.setdefault(point.epoch, point)
    return [points[epoch] for epoch in sorted(points)]
