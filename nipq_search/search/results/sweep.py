"""Access to the results in a sweep's folder, during and after the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import torch
import yaml
from torch import nn

from nipq_search import blobs, file_io
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
    committed_record,
    job_folder,
    model_file,
)
from nipq_search.search.jobs.lease import live_driver
from nipq_search.search.results import documents
from nipq_search.search.results.best import best_document
from nipq_search.search.study.storage import StudyNotFound, close_storage, load_study
from nipq_search.tasks import make_task
from nipq_search.train import TrainSpec
from nipq_search.train.models import load_trained

if TYPE_CHECKING:
    import pandas

_log = logging.getLogger("nipq_search")


def is_sweep(folder: Path) -> bool:
    """Return whether a folder contains the files of a sweep."""
    return (folder / SWEEP_FILE).is_file() and (folder / FACTS_FILE).is_file()


class Sweep:
    """The results of a sweep, which are read from its folder on request.

    Only `write_report` writes to the folder.

    Args:
        folder: the sweep's folder.

    Attributes:
        folder: absolute path of the folder.
        config: the resolved configuration.
        facts: the resolved facts of the last run, `ResolvedSweep.as_json()`.

    Raises:
        UserError: the folder is missing, not a sweep or damaged, or one of the sweep's plug-ins
            is not installed.

    Example:
        Open the folder of a sweep, here a minimal one that runs without Ray.

        >>> import tempfile
        >>> from nipq_search import Sweep, search
        >>> from nipq_search.search.backend.virtual import VirtualExecutor
        >>> config = {
        ...     "name": "demo",
        ...     "task": "digits",
        ...     "budgets": [{"bops": "uniform 4"}],
        ...     "float": {"epochs": 1},
        ...     "train": {"epochs": 1},
        ...     "search": {"trials": 1, "baselines": []},
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = search(config, folder, executor=VirtualExecutor())
        ...     sweep = Sweep(folder)
        ...     record = sweep.record(0)
        ...     model = sweep.load_model(0)
        >>> record.state, record.budget_label
        ('COMPLETE', 'bops: uniform 4')
        >>> model.training
        False
    """

    def __init__(self, folder: Path | str) -> None:
        """Read the configuration and the facts of the sweep."""
        folder = Path(folder).absolute()
        if folder.is_file():
            raise UserError(f"{folder} is a file; give the folder of the sweep, such as runs/NAME")
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; `nipq-search run CONFIG --out DIR` creates one"
            )
        missing = [n for n in (SWEEP_FILE, FACTS_FILE) if not (folder / n).is_file()]
        if len(missing) == 1:
            raise UserError(
                f"{folder}: {missing[0]} is missing; run the same `run` command again to write it"
            )
        if missing:
            raise UserError(
                f"{folder}: not a sweep ({SWEEP_FILE} is missing); give the --out folder"
            )
        try:
            config = yaml.safe_load((folder / SWEEP_FILE).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder / SWEEP_FILE}: cannot be read ({reason})") from error
        facts = file_io.read_json(folder / FACTS_FILE)
        needed = {"metric", "mode", "costs", "axis", "front_cost", "budgets"}
        if not isinstance(facts, dict) or not needed <= facts.keys():
            raise UserError(f"{folder / FACTS_FILE}: damaged; run the sweep again to rewrite it")
        plugins = config.get("plugins") if isinstance(config, dict) else None
        if isinstance(plugins, dict):
            check_installed(plugins)
        try:
            if not isinstance(config, dict):
                raise UserError("not a mapping")
            config = parse_config(config).as_json()
        except UserError as error:
            raise UserError(
                f"{folder / SWEEP_FILE}: damaged; run the sweep again with the original "
                f"sweep file ({error})"
            ) from error
        self.folder, self.config, self.facts = folder, config, facts

    @classmethod
    def open(cls, folder: Path | str) -> Sweep:
        """Return `Sweep(folder)`."""
        return cls(folder)

    def trials(self) -> list[TrialRecord]:
        """Return one record per trial of the ledger; empty if no job has been started.

        Raises:
            UserError: the study is missing although a job has been started, or it belongs to
                another sweep; see `load_study`.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        name, identity = str(self.config["name"]), self.facts.get("study")
        try:
            study, storage = load_study(self.folder, name, identity)
        except StudyNotFound:
            if jobs.any_attempt_exists(self.folder):
                raise
            return []
        try:
            found = study.get_trials(deepcopy=False)
        finally:
            close_storage(storage)
        return documents.Records(self.facts, self.folder).update(found)

    def record(self, trial: int) -> TrialRecord:
        """Return the record of one trial.

        Raises:
            UserError: the trial does not exist.
        """
        records = self.trials()
        if not 0 <= trial < len(records):
            known = f"0 to {len(records) - 1}" if records else "none yet"
            raise UserError(f"trial {trial}: no such trial (existing trials: {known})")
        return records[trial]

    def front(self) -> pandas.DataFrame:
        """Return the Pareto front as a table, cheapest point first, with one column per cost."""
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
        """Return the document of `front --json`."""
        return documents.front_document(self.trials(), self.facts, self.config, self.folder)

    def status(self) -> dict[str, Any]:
        """Return the document of `status --json`."""
        driver = live_driver(self.folder)
        shown = driver and {"host": driver["host"], "pid": driver["pid"]}
        return documents.status_document(self.trials(), self.config, shown, self.folder)

    def layers(self, trial: int) -> list[dict[str, Any]]:
        """Return the bit-widths and costs of a COMPLETE trial by layer; empty for other trials."""
        record = committed_record(job_folder(self.folder, "trial", trial)) or {}
        return list(record.get("layers", []))

    def history(self, trial: int) -> list[dict[str, Any]]:
        """Return the `TrainResult.history` of a COMPLETE trial; empty for other trials."""
        record = committed_record(job_folder(self.folder, "trial", trial)) or {}
        return list(record.get("history", []))

    def model_file(self, trial: int) -> Path | None:
        """Return the path of a trial's trained model, or None if it does not exist."""
        folder = job_folder(self.folder, "trial", trial)
        file = model_file(folder)
        return file if committed_record(folder) and blobs.exists(file) else None

    def load_model(self, trial: int) -> nn.Module:
        """Load the hard-quantized model of a COMPLETE trial, in evaluation mode on the CPU.

        Raises:
            UserError: the trial does not exist or has no model, or the sweep's task cannot be
                created.
        """
        file = self.model_file(trial)
        state = self.record(trial).state
        if file is None or state != "COMPLETE":
            raise UserError(self._why_no_model(trial, state))
        config = parse_config(dict(self.config))
        task = make_task(config.task, config.task_args)
        record = committed_record(job_folder(self.folder, "trial", trial)) or {}
        spec = TrainSpec(
            train=config.train.with_hyperparameters(split(record["params"])[0]),
            seed=record["seed"],
            quant=config.quant,
        )
        return load_trained(task, spec, file, torch.device("cpu"))

    def _why_no_model(self, trial: int, state: str) -> str:
        """Explain why a trial has no trained model."""
        why = "deleted by `nipq-search gc`"
        if state != "COMPLETE":
            why = f"its state is {state}"
        elif committed_record(folder := job_folder(self.folder, "trial", trial)) is None:
            why = f"its record is missing; restore {folder}"
        return f"trial {trial}: no trained model ({why})"

    def show(self, trial: int) -> dict[str, Any]:
        """Return the document of `show --json`.

        Raises:
            UserError: the trial does not exist.
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
        """Return the relative path of a trial's model; warn if a COMPLETE trial has none."""
        file = self.model_file(trial)
        if file is None and state == "COMPLETE":
            _log.warning(self._why_no_model(trial, state))
        return None if file is None else str(file.relative_to(self.folder))

    def best(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """Return the document of `best --json`.

        Raises:
            UserError: a limit names an unknown cost.
        """
        for name in limits:
            if name not in self.facts["costs"]:
                raise UserError(
                    f"--max {name}: unknown cost{nearest(name, self.facts['costs'])}; the costs "
                    f"of this sweep are {', '.join(self.facts['costs'])}"
                )
        document = best_document(self.front_document()["points"], limits, self.facts, self.layers)
        point = document["point"]
        return {**document, "model": point and self._shown_file(point["trial"])}

    def log_files(self, trial: int) -> list[Path]:
        """List a trial's non-empty files of output, tracebacks and stacks, attempt by attempt.

        Raises:
            UserError: the trial does not exist.
        """
        self.record(trial)
        found = []
        for attempt in jobs.attempts(job_folder(self.folder, "trial", trial)):
            others = sorted(attempt.glob("log-*.txt"))
            own = [attempt / name for name in (jobs.LOG, jobs.TRACEBACK, jobs.HANG)]
            found += [f for f in (*own, *others) if f.exists() and f.stat().st_size]
        return found

    def curve(self, trial: int) -> list[CurvePoint]:
        """Return the learning curve of a trial."""
        return jobs.curve(job_folder(self.folder, "trial", trial))

    def summary(self) -> SweepRecord:
        """Return the sweep-level data of the report."""
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
        file_io.write_bytes(self.folder / REPORT_FILE, page.encode())
        return self.folder / REPORT_FILE
