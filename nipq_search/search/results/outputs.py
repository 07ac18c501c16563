"""A sweep as it is shown: tables, report, MLflow. All of it can be made again at any time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from nipq_search import storage
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

PAUSE = 20
"""Writing the tables takes at most one part in so many of the driver's time, and so does looking
at running trials."""

ENDED = "ended"
"""Study attribute: how the last run of the sweep ended, in MLflow's words."""


class Projections:
    """Keeps tables and MLflow up to date with the ledger.

    Args:
        out: the sweep's folder.
        config: the sweep.
    """

    def __init__(self, out: Path, config: SweepConfig) -> None:
        """Nothing is written yet."""
        self.out, self.config = out, config
        self.sweep = Sweep.open(out)
        self.recorder = MlflowRecorder(out, config.name, identity=self.sweep.facts.get("study"))
        self.records: list[TrialRecord] = []
        self.known = documents.Records(self.sweep.facts, out)
        self._curves: dict[int, list[CurvePoint]] = {}
        self._behind = self._forgotten = False
        self._pause_until = 0.0

    def begin(self, trials: Sequence[FrozenTrial]) -> None:
        """Open the tracking run and bring everything that has ended up to date."""
        dataset = self.sweep.facts.get("dataset", {})
        tags = {"strategy": self.config.search.strategy, "task": self.config.task}
        self.recorder.begin(self.config.as_json(), tags, dataset)
        self.refresh(trials)
        for record in self.records:
            if record.state in documents.STATES[:3]:
                self.record(record)

    def refresh(self, trials: Sequence[FrozenTrial], running: bool = True) -> None:
        """Take the ledger's trials, those that run only if wanted; the tables follow."""
        if self._forgotten:
            self.known, self._forgotten = documents.Records(self.sweep.facts, self.out), False
        try:
            self.records = self.known.update(trials, running)
        except BaseException:
            self._forgotten = True  # it may be half done
            raise
        self._behind = True
        self.write_tables()

    def forget(self) -> None:
        """Read finished trials anew the next time."""
        self._forgotten = True

    def write_tables(self, force: bool = False) -> None:
        """Write the tables if they are behind, with pauses of many times what that takes.

        A table is written whole, so with thousands of trials every trial would cost more.
        """
        if not self._behind or (time.monotonic() < self._pause_until and not force):
            return
        began = time.monotonic()
        curves = {r.trial: self._curve(r) for r in self.records}
        write_table(self.out / RESULTS_FILE, results_table(self.records))
        write_table(self.out / CURVES_FILE, curves_table(curves))
        self._behind = False
        self._pause_until = time.monotonic() + PAUSE * (time.monotonic() - began)

    def _curve(self, record: TrialRecord) -> list[CurvePoint]:
        """A trial's learning curve, of a finished one as it was read first."""
        if record.trial in self._curves:
            return self._curves[record.trial]
        curve = self.sweep.curve(record.trial)
        if record.state in documents.STATES[:3]:
            self._curves[record.trial] = curve
        return curve

    def record(self, record: TrialRecord) -> None:
        """Show one trial in MLflow as it is now."""
        layers = self.sweep.layers(record.trial) if record.state == "COMPLETE" else None
        self.recorder.record(record, self._curve(record), layers)

    def update_front(self) -> None:
        """Tag the trials that are on the front."""
        self.recorder.update_front(self.known.front)

    def finish(self, status: str) -> None:
        """Write the front and the report, and end the tracking run.

        Args:
            status: `FINISHED`, `FAILED` or `KILLED`.

        Raises:
            OSError: the folder cannot be written.
        """
        self.write_tables(force=True)
        document = self.sweep.front_document()
        storage.write_json(self.out / FRONT_FILE, document)
        self.sweep.write_report()
        front = self.out / "front.parquet"
        write_table(front, results_table([r for r in self.records if r.on_front]))
        for record in self.records:  # those that stay open too: they show as KILLED
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
    """Send the tracking server what it lacks; tables and report are written anew.

    Everything that MLflow shows follows from the study and the trials' folders, so nothing else
    has to be kept while the server is away. A running driver does the same by itself.

    Args:
        out: the sweep's folder.

    Returns:
        `server`, without what a URI may hide in it, and `trials`, the number of runs.

    Raises:
        UserError: a driver is running the sweep, or it is not a sweep.
        RuntimeError: the server does not answer, or took only a part.
    """
    sweep = Sweep.open(out)
    config = parse_config(dict(sweep.config))
    with driver_lease(out.absolute()) as token, study_lease(config.name, token):
        shown = Projections(out.absolute(), config)
        ledger = Ledger.load(out.absolute(), config.name, sweep.facts.get("study"))
        try:
            trials, ended = ledger.trials(), str(ledger.recall(ENDED) or "KILLED")
        finally:
            ledger.close()
        shown.begin(trials)
        shown.finish(ended)
        if shown.recorder.behind:
            raise RuntimeError(
                f"the tracking server {shown.recorder.address} does not answer or took only a "
                "part; nothing is lost, the same command goes on"
            )
        started = [r for r in shown.records if r.state != "WAITING"]
        return {"server": shown.recorder.address, "trials": len(started)}
