"""A sweep's folder, read only; it works while the sweep runs and after it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import torch
import yaml
from torch import nn

from nipq_search import blobs, storage
from nipq_search.cost import CONVENTION
from nipq_search.errors import UserError, nearest
from nipq_search.records import SCHEMA, CurvePoint, SweepRecord, TrialRecord
from nipq_search.report.movement import never_moved
from nipq_search.search import jobs
from nipq_search.search.config.plugins import check_installed
from nipq_search.search.config.space import split
from nipq_search.search.config.sweep_config import parse_config
from nipq_search.search.jobs import (
    FACTS_FILE,
    REPORT_FILE,
    SWEEP_FILE,
    committed,
    job_folder,
    model_file,
)
from nipq_search.search.jobs.lease import live_driver
from nipq_search.search.results import documents
from nipq_search.search.study.storage import StudyGone, close_storage, load_study
from nipq_search.tasks import make_task
from nipq_search.train import TrainSpec
from nipq_search.train.models import load_trained

if TYPE_CHECKING:
    import pandas

_log = logging.getLogger("nipq_search")


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds a sweep."""
    return (folder / SWEEP_FILE).is_file() and (folder / FACTS_FILE).is_file()


class Sweep:
    """A sweep's folder.

    Args:
        folder: the folder that `run` wrote.
        config: the resolved configuration.
        facts: `Facts.as_json()` of the last run.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Bind to a folder; nothing is read yet."""
        self.folder, self.config, self.facts = folder, config, facts

    @classmethod
    def open(cls, folder: Path | str) -> Sweep:
        """Open a sweep's folder.

        Raises:
            UserError: it is not one.
        """
        folder = Path(folder).absolute()
        if folder.is_file():
            raise UserError(f"{folder}: a file; give the folder of the sweep, as runs/NAME")
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; `nipq-search run CONFIG --out DIR` makes one"
            )
        missing = [n for n in (SWEEP_FILE, FACTS_FILE) if not (folder / n).is_file()]
        if len(missing) == 1:
            raise UserError(f"{folder}: {missing[0]} is gone; the same `run` command writes it")
        if missing:
            raise UserError(
                f"{folder}: not a sweep (it has no {SWEEP_FILE}); give the --out folder"
            )
        try:
            config = yaml.safe_load((folder / SWEEP_FILE).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder / SWEEP_FILE}: cannot be read ({reason})") from error
        facts = storage.read_json(folder / FACTS_FILE)
        needed = {"metric", "mode", "costs", "axis", "front_cost", "budgets"}
        if not isinstance(facts, dict) or not needed <= facts.keys():
            raise UserError(f"{folder / FACTS_FILE}: damaged; run it again")
        plugins = config.get("plugins") if isinstance(config, dict) else None
        if isinstance(plugins, dict):
            check_installed(plugins)
        try:
            if not isinstance(config, dict):
                raise UserError("no mapping")
            config = parse_config(config).as_json()
        except UserError as error:
            raise UserError(
                f"{folder / SWEEP_FILE}: damaged; run it again with the file that you gave it "
                f"({error})"
            ) from error
        return cls(folder, config, facts)

    def trials(self) -> list[TrialRecord]:
        """One record per trial of the ledger.

        Raises:
            UserError: the study is gone, or is another one; see `load_study`.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        name, identity = str(self.config["name"]), self.facts.get("study")
        try:
            study, storage = load_study(self.folder, name, identity)
        except StudyGone:
            if jobs.have_begun(self.folder):
                raise
            return []
        try:
            found = study.get_trials(deepcopy=False)
        finally:
            close_storage(storage)
        return documents.Records(self.facts, self.folder).update(found)

    def record(self, trial: int) -> TrialRecord:
        """One trial.

        Raises:
            UserError: there is no such trial.
        """
        records = self.trials()
        if not 0 <= trial < len(records):
            known = f"0 to {len(records) - 1}" if records else "none yet"
            raise UserError(f"trial {trial}: no such trial (there are {known})")
        return records[trial]

    def front(self) -> pandas.DataFrame:
        """The points on the front, cheapest first: a row each, costs in columns."""
        import pandas

        points = [p for p in self.front_document()["points"] if p["on_front"]]
        return pandas.DataFrame(
            [
                {
                    "trial": p["trial"],
                    "budget": p["budget_label"],
                    **p["cost"],
                    "validation": p["validation"],
                    "test": p["test"],
                    "samples": p["samples"],
                }
                for p in points
            ]
        )

    def front_document(self) -> dict[str, Any]:
        """What `front --json` prints."""
        return documents.front_document(self.trials(), self.facts, self.config, self.folder)

    def status(self) -> dict[str, Any]:
        """What `status --json` prints."""
        driver = live_driver(self.folder)
        shown = driver and {"host": driver["host"], "pid": driver["pid"]}
        return documents.status_document(self.trials(), self.config, shown, self.folder)

    def layers(self, trial: int) -> list[dict[str, Any]]:
        """Bits by layer of a finished trial; empty while there are none."""
        record = committed(job_folder(self.folder, "trial", trial)) or {}
        return list(record.get("layers", []))

    def history(self, trial: int) -> list[dict[str, Any]]:
        """Bit-widths over the noise phase of a finished trial; see `TrainResult.history`."""
        record = committed(job_folder(self.folder, "trial", trial)) or {}
        return list(record.get("history", []))

    def model_file(self, trial: int) -> Path | None:
        """File of a trial's trained model; None while there is none."""
        folder = job_folder(self.folder, "trial", trial)
        file = model_file(folder)
        return file if committed(folder) and blobs.exists(file) else None

    def load_model(self, trial: int) -> nn.Module:
        """The trained model of a COMPLETE trial, hard-quantized, in evaluation mode on the CPU.

        Raises:
            UserError: the trial has no model, or the sweep's task cannot be built.
        """
        file = self.model_file(trial)
        state = self.record(trial).state
        if file is None or state != "COMPLETE":
            raise UserError(self._why_no_model(trial, state))
        config = parse_config(dict(self.config))
        task = make_task(config.task, config.task_args)
        record = committed(job_folder(self.folder, "trial", trial)) or {}
        spec = TrainSpec(
            train=config.train.with_hyperparameters(split(record["params"])[0]),
            seed=record["seed"],
            quant=config.quant,
        )
        return load_trained(task, spec, file, torch.device("cpu"))

    def _why_no_model(self, trial: int, state: str) -> str:
        """A line on why a trial has no trained model."""
        why = "`nipq-search gc` freed it"
        if state != "COMPLETE":
            why = f"it is {state}"
        elif committed(folder := job_folder(self.folder, "trial", trial)) is None:
            why = f"its record is gone; restore {folder}"
        return f"trial {trial}: it has no trained model ({why})"

    def show(self, trial: int) -> dict[str, Any]:
        """What `show --json` prints.

        Raises:
            UserError: there is no such trial.
        """
        record = self.record(trial)
        return {
            "schema": SCHEMA,
            "trial": trial,
            "state": record.state,
            "reason": record.reason,
            "params": dict(record.params),
            "budget": dict(record.budget),
            "budget_label": record.budget_label,
            "validation": record.validation,
            "test": record.test,
            "cost": dict(record.cost),
            "parent": record.parent,
            "model": self._shown_file(trial, record.state),
            "bops_convention": CONVENTION,
            "layers": self.layers(trial),
            "never_moved": never_moved(self.history(trial)),
        }

    def _shown_file(self, trial: int, state: str = "COMPLETE") -> str | None:
        file = self.model_file(trial)
        if file is None and state == "COMPLETE":
            _log.warning(self._why_no_model(trial, state))
        return None if file is None else str(file.relative_to(self.folder))

    def best(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """What `best --json` prints.

        Raises:
            UserError: a limit names no cost.
        """
        for name in limits:
            if name not in self.facts["costs"]:
                raise UserError(
                    f"--max {name}: unknown cost{nearest(name, self.facts['costs'])}; the costs "
                    f"of this sweep are {', '.join(self.facts['costs'])}"
                )
        document = documents.best_document(
            self.front_document()["points"], limits, self.facts, self.layers
        )
        point = document["point"]
        return {**document, "model": point and self._shown_file(point["trial"])}

    def log_files(self, trial: int) -> list[Path]:
        """Output, tracebacks and stacks of hangs, attempt by attempt.

        Raises:
            UserError: there is no such trial.
        """
        self.record(trial)
        found = []
        for attempt in jobs.attempts(job_folder(self.folder, "trial", trial)):
            others = sorted(attempt.glob("log-*.txt"))
            own = [attempt / name for name in (jobs.LOG, jobs.TRACEBACK, jobs.HANG)]
            found += [f for f in (*own, *others) if f.exists() and f.stat().st_size]
        return found

    def curve(self, trial: int) -> list[CurvePoint]:
        """The learning curve of a trial."""
        return jobs.curve(job_folder(self.folder, "trial", trial))

    def summary(self) -> SweepRecord:
        """The sweep apart from its trials, for the report."""
        return SweepRecord(
            name=self.config["name"],
            config=self.config,
            task=self.config["task"],
            dataset=self.facts.get("dataset", {}),
            metric=self.facts["metric"],
            mode=self.facts["mode"],
            front=self.front_document(),
            baselines=tuple(
                documents.baselines(
                    self.config["search"]["baselines"], self.facts["metric"], self.folder
                )
            ),
        )

    def write_report(self) -> Path:
        """Write `report.html` and return its path."""
        from nipq_search.report.html import render
        from nipq_search.tracking.tables import curves_table, results_table

        records = self.trials()
        curves = {r.trial: self.curve(r.trial) for r in records}
        layers = {r.trial: self.layers(r.trial) for r in records if r.state == "COMPLETE"}
        histories = {trial: self.history(trial) for trial in layers}
        page = render(
            self.summary(), results_table(records), curves_table(curves), layers, histories
        )
        storage.write_bytes(self.folder / REPORT_FILE, page.encode())
        return self.folder / REPORT_FILE
