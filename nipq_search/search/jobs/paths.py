"""Names of the files in a sweep's folder, and the folders of its jobs.

`docs/files.md` documents them for users. They never change, so that sweep folders written by
earlier versions can be opened.
"""

from __future__ import annotations

from pathlib import Path

SWEEP_FILE, FACTS_FILE, REPORT_FILE = "sweep.yaml", "facts.json", "report.html"
RESULTS_FILE, CURVES_FILE, FRONT_FILE = "results.parquet", "curves.parquet", "front.json"
LOCK_FILE, STOP_FILE, LOG_FILE = "driver.lock", "stop.request", "driver.log"
"""Files of the sweep as a whole."""

RESULT, STARTED, STOPPED, LOST, PROGRESS, CURVE, LOG, TRACEBACK, HANG = (
    "result.json",
    "started.json",
    "stopped.json",
    "lost.json",
    "progress.json",
    "curve.jsonl",
    "log.txt",
    "traceback.txt",
    "hang.txt",
)
"""Files of one attempt of a job."""

TEST_FILE = "test.json"
"""A job's metrics on the test split."""


def job_folder(out: Path, kind: str, number: int) -> Path:
    """Return the folder of a job.

    Args:
        out: the sweep's folder.
        kind: kind of the job; see `Job`.
        number: number of the job; see `Job`.

    Returns:
        A folder below `out`.
    """
    if kind == "trial":
        return out / "trials" / str(number)
    if kind == "baseline":
        return out / "baselines" / f"lsq-{number}"
    return out / kind


def rung_file(folder: Path, rung: int) -> Path:
    """Return the path of a trial's record at a rung."""
    return folder / f"rung-{rung}.json"
