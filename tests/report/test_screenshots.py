"""The script that takes the screenshots of the documentation, on a small synthetic sweep."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import optuna
import pytest
from made_up_sweep import complete, curve, failed

from nipq_search.report import ReportData, render
from nipq_search.tracking import MlflowRecorder

SCRIPT = Path(__file__).parents[2] / "dashboards" / "screenshots.py"


def make_sweep(folder: Path, data: ReportData) -> None:
    """Write the inputs of the dashboards: MLflow's database, a study and the report."""
    report = folder / "report.html"
    report.write_text(render(data.sweep, data.results, data.curves, data.layers))
    trials = [complete(0, front=True), complete(1, bits=3, front=True), failed(2)]
    recorder = MlflowRecorder(folder, "digits")
    recorder.begin({"seed": 0}, {}, {"name": "digits"})
    for trial in trials:
        recorder.record(trial, curve(trial.trial))
    recorder.finish("FINISHED", [report], {"hypervolume": 0.8})
    assert not recorder.behind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="digits",
            directions=["maximize", "minimize"],
        )
        for trial in trials:
            done = trial.state == "COMPLETE"
            study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState[trial.state],
                    values=[trial.validation or 0.0, trial.cost["bops"]] if done else None,
                    params={"lr": trial.params["lr"]},
                    distributions={"lr": optuna.distributions.FloatDistribution(0.001, 1.0)},
                )
            )


@pytest.mark.browser
def test_the_script_takes_every_picture(
    tmp_path: Path, data: ReportData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sweep, out = tmp_path / "sweep", tmp_path / "images"
    sweep.mkdir()
    make_sweep(sweep, dataclasses.replace(data))
    command = [sys.executable, str(SCRIPT), str(sweep), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in out.iterdir()} == {
        "report.png",
        "pareto.png",
        "mlflow-runs.png",
        "mlflow-charts.png",
        "mlflow-compare.png",
        "optuna-study.png",
        "optuna-parameters.png",
    }
    assert all(10_000 < path.stat().st_size < 300_000 for path in out.iterdir())


def test_a_folder_without_a_sweep_is_rejected(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "has no mlflow.db" in done.stderr
