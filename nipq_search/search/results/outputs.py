"""Outputs of a sweep: tables, report and MLflow runs, which can all be rebuilt at any time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from nipq_search import file_io
from nipq_search.records import CurvePoint, TrialRecord
from nipq_search.search.config.sweep_config import SweepConfig, parse_config
from nipq_search.search.jobs import CURVES_FILE, FRONT_FILE, RESULTS_FILE
from nipq_search.search.jobs.lease import driver_lease
from nipq_search.search.results import documents
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.study.database_lease import study_lease
from nipq_search.search.study.ledger import Ledger
from nipq_search.tracking import MlflowRecorder
from nipq_search.tracking.tables import curves_table, results_table, write_table

PAUSE_FACTOR = 20
"""Pause after writing the tables or recording running trials, as a multiple of the duration of
that step, so that each of the two steps uses at most about 1/20 of the driver's time."""

RUN_STATUS_ATTRIBUTE = "ended"
"""Study attribute that stores the `RunStatus` of the sweep's last run."""


class RunStatus(StrEnum):
    """Final status of a run of the driver, in MLflow's terms.

    Attributes:
        FINISHED: the sweep completed or reached a limit.
        FAILED: the sweep cannot continue.
        KILLED: the run was interrupted or killed.
    """

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


class Outputs:
    """Keeps the tables, the report and the MLflow runs up to date with the ledger.

    Args:
        out: the sweep's folder.
        config: the sweep configuration.

    Attributes:
        records: records of all trials, as of the last refresh.
        cache: the incrementally updated source of `records`.
    """

    def __init__(self, out: Path, config: SweepConfig) -> None:
        """Read the sweep's folder; nothing is written."""
        self.out, self.config = out, config
        self.sweep = Sweep.open(out)
        self.recorder = MlflowRecorder(out, config.name, identity=self.sweep.facts.get("study"))
        self.records: list[TrialRecord] = []
        self.cache = documents.Records(self.sweep.facts, out)
        self._curves: dict[int, list[CurvePoint]] = {}
        self._tables_outdated = self._cache_invalid = False
        self._pause_until = 0.0

    def begin(self, trials: Sequence[FrozenTrial]) -> None:
        """Open the tracking run, refresh the records, and record every ended trial in MLflow."""
        dataset = self.sweep.facts.get("dataset", {})
        tags = {"strategy": self.config.search.strategy, "task": self.config.task}
        self.recorder.begin(self.config.as_json(), tags, dataset)
        self.refresh(trials)
        for record in self.records:
            if record.state in documents.ENDED_STATES:
                self.record(record)

    def refresh(self, trials: Sequence[FrozenTrial], running: bool = True) -> None:
        """Update the records from the ledger's trials, and write the tables if the pause is over.

        Args:
            trials: all trials of the study, ordered by number.
            running: whether to also update unfinished trials whose state has not changed.
        """
        if self._cache_invalid:
            self.cache, self._cache_invalid = documents.Records(self.sweep.facts, self.out), False
        try:
            self.records = self.cache.update(trials, running)
        except BaseException:
            self._cache_invalid = True  # the update may be incomplete
            raise
        self._tables_outdated = True
        self.write_tables()

    def invalidate(self) -> None:
        """Make the next refresh rebuild all records, including those of finished trials."""
        self._cache_invalid = True

    def write_tables(self, force: bool = False) -> None:
        """Write the tables if they are outdated and the pause after the last write is over.

        If `force` is set, do not wait for the end of the pause. Each write rewrites the whole
        tables, so its duration grows with the number of trials, and the pause grows in proportion.
        """
        if not self._tables_outdated or (time.monotonic() < self._pause_until and not force):
            return
        began = time.monotonic()
        curves = {r.trial: self._curve(r) for r in self.records}
        write_table(self.out / RESULTS_FILE, results_table(self.records))
        write_table(self.out / CURVES_FILE, curves_table(curves))
        self._tables_outdated = False
        self._pause_until = time.monotonic() + PAUSE_FACTOR * (time.monotonic() - began)

    def _curve(self, record: TrialRecord) -> list[CurvePoint]:
        """Return a trial's learning curve; that of a finished trial is read only once."""
        if record.trial in self._curves:
            return self._curves[record.trial]
        curve = self.sweep.curve(record.trial)
        if record.state in documents.ENDED_STATES:
            self._curves[record.trial] = curve
        return curve

    def record(self, record: TrialRecord) -> None:
        """Record the current state of a trial in MLflow."""
        layers = self.sweep.layers(record.trial) if record.state == "COMPLETE" else None
        self.recorder.record(record, self._curve(record), layers)

    def update_front(self) -> None:
        """Tag the trials on the Pareto front in MLflow."""
        self.recorder.update_front(self.cache.front)

    def finish(self, status: RunStatus) -> None:
        """Write the tables, the front and the report, record all trials, and end the tracking run.

        Raises:
            OSError: a file cannot be written.
        """
        self.write_tables(force=True)
        document = self.sweep.front_document()
        file_io.write_json(self.out / FRONT_FILE, document)
        self.sweep.write_report()
        front = self.out / "front.parquet"
        write_table(front, results_table([r for r in self.records if r.on_front]))
        for record in self.records:  # trials that are still open appear as KILLED
            self.record(record)
        self.update_front()
        figures = {
            name: document[name]
            for name in ("hypervolume", "test_hypervolume", "total_samples")
            if document[name] is not None
        }
        files = [front, self.out / FRONT_FILE, self.out / "report.html"]
        self.recorder.finish(status, files, figures)


def sync(out: Path) -> dict[str, Any]:
    """Bring the tracking server up to date, and rewrite the tables, the front and the report.

    MLflow shows only data derived from the study and the trials' folders, so nothing needs to be
    stored separately while the server is unavailable. A running driver does the same on its own.

    Args:
        out: the sweep's folder.

    Returns:
        A mapping with `server`, the server's address without credentials, and `trials`, the number
        of trials that have a run on the server.

    Raises:
        UserError: the folder is not a sweep, its study is missing, or a driver is running it.
        RuntimeError: the server did not respond, or accepted only part of the data.
    """
    sweep = Sweep.open(out)
    config = parse_config(dict(sweep.config))
    with driver_lease(out.absolute()) as token, study_lease(config.name, token):
        outputs = Outputs(out.absolute(), config)
        ledger = Ledger.load(out.absolute(), config.name, sweep.facts.get("study"))
        try:
            trials = ledger.trials()
            status = RunStatus(ledger.recall(RUN_STATUS_ATTRIBUTE) or RunStatus.KILLED)
        finally:
            ledger.close()
        outputs.begin(trials)
        outputs.finish(status)
        if outputs.recorder.behind:
            raise RuntimeError(
                f"the tracking server {outputs.recorder.address} did not respond or accepted only "
                "part of the data; nothing is lost; run the same command again"
            )
        started = [r for r in outputs.records if r.state != "WAITING"]
        return {"server": outputs.recorder.address, "trials": len(started)}
