"""`ui` with the real dashboards on the folder of a tiny sweep."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from nipq_search.cli import main
from nipq_search.cli import ui as module

MAKE_FOLDER = """
import sys, mlflow, optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
mlflow.set_tracking_uri("sqlite:///mlflow.db")
experiment = mlflow.create_experiment("tiny", artifact_location="mlartifacts")
with mlflow.start_run(experiment_id=experiment, run_name="trial 0"):
    mlflow.log_metric("accuracy", 0.5)
storage = JournalStorage(JournalFileBackend("study.log"))
study = optuna.create_study(storage=storage, study_name="tiny")
study.optimize(lambda trial: trial.suggest_float("lr", 0, 1), n_trials=1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with one MLflow run and one Optuna trial."""
    path = tmp_path_factory.mktemp("sweep")
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", MAKE_FOLDER]
    subprocess.run(command, cwd=path, env=environment, check=True, capture_output=True)
    return path


def fetch(url: str, body: dict[str, object] | None = None) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with opener.open(request, timeout=30) as answer:
        return answer.read()


def processes_in(folder: Path) -> set[int]:
    """Return the processes whose working directory is `folder`, such as the dashboards."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve(strict=True) == folder.resolve():
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def test_both_dashboards_respond_until_ctrl_c(folder):
    command = [sys.executable, "-m", "nipq_search.cli", "ui", str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            urls = dict(process.stdout.readline().strip().split(": ", 1) for _ in range(2))
            assert set(urls) == {"MLflow", "optuna-dashboard"}
            assert all(url.startswith("http://127.0.0.1:") for url in urls.values())
            search = fetch(
                f"{urls['MLflow']}/api/2.0/mlflow/experiments/search", {"max_results": 10}
            )
            assert "tiny" in {found["name"] for found in json.loads(search)["experiments"]}
            studies = json.loads(fetch(f"{urls['optuna-dashboard']}/api/studies"))
            assert [study["study_name"] for study in studies["study_summaries"]] == ["tiny"]
            assert processes_in(folder)
        finally:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert processes_in(folder) == set()


def test_a_folder_without_databases_is_rejected(tmp_path, capsys):
    assert main(["ui", str(tmp_path)]) == 2
    assert "no local databases of a sweep" in capsys.readouterr().err


def test_a_port_in_use_is_rejected_before_anything_starts(tmp_path, capsys, monkeypatch):
    (tmp_path / "study.log").touch()
    monkeypatch.setattr(subprocess, "Popen", None)
    with socket.socket() as other:
        other.bind((module.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["ui", str(tmp_path), "--optuna-port", str(port)]) == 2
    assert f"--optuna-port {port}: the port is in use" in capsys.readouterr().err


def test_a_free_port_replaces_a_default_port_in_use(monkeypatch):
    with socket.socket() as other:
        other.bind((module.HOST, 0))
        other.listen()
        usual = other.getsockname()[1]
        assert module._port(None, usual, "--mlflow-port") != usual


def test_a_dashboard_that_exits_reports_its_last_line(tmp_path, capsys, monkeypatch):
    program = "import sys; print('first'); sys.exit('no such study')"
    server = module.Server(name="Broken", command=[sys.executable, "-c", program], port=1)
    monkeypatch.setattr(module, "plan_servers", lambda *arguments: [server])
    assert main(["ui", str(tmp_path)]) == 1
    assert "error: Broken has exited: no such study" in capsys.readouterr().err
    assert processes_in(tmp_path) == set()


def test_only_existing_databases_are_served(tmp_path, capsys):
    (tmp_path / "study.db").touch()
    (server,) = module.plan_servers(tmp_path, None, None)
    assert server.name == "optuna-dashboard"
    assert f"sqlite:///{tmp_path.resolve()}/study.db" in server.command
    assert "MLFLOW_TRACKING_URI" in capsys.readouterr().err
