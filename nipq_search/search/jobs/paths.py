"""Names of the files in a sweep's folder, and the folders of its jobs.

`docs/files.md` lists them for users. They are fixed: folders of earlier versions must open.
"""

from __future__ import annotations

from pathlib import Path

SWEEP_FILE, FACTS_FILE, REPORT_FILE = "sweep.yaml", "facts.json", "report.html"
RESULTS_FILE, CURVES_FILE, FRONT_FILE = "results.parquet", "curves.parquet", "front.json"
LOCK_FILE, STOP_FILE, LOG_FILE = "driver.lock", "stop.request", "driver.log"
"""Files of the sweep itself."""

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
"""File of a job with its metrics on the test split."""


def job_folder(out: Path, kind: str, number: int) -> Path:
    """Folder of a job below the sweep's folder."""
    if kind == "trial":
        return out / "trials" / str(number)
    if kind == "baseline":
        return out / "baselines" / f"lsq-{number}"
    return out / kind


def rung_file(folder: Path, rung: int) -> Path:
    """Where a trial's figures at a rung stand."""
    return folder / f"rung-{rung}.json"
