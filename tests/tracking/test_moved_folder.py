"""A real MLflow server opens the folder of a finished sweep after the folder was moved."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from made_up_sweep import complete, curve, layers

from nipq_search.tracking import MlflowRecorder


def fetch(url: str, body: dict[str, Any] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


@contextmanager
def mlflow_ui(folder: Path) -> Iterator[str]:
    """Run `mlflow ui` in `folder` with no option except the port; yield its address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # would start more processes
    with (folder.parent / "ui.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                fetch(f"{address}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_mlflow_ui_shows_a_moved_sweep_with_its_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / "before"
    out.mkdir()
    report = out / "report.html"
    report.write_text("<p>größe</p>")
    recorder = MlflowRecorder(out, "digits")
    recorder.begin({"seed": 0}, {}, {"name": "digits"})
    recorder.record(complete(0, front=True), curve(0), layers(0))
    recorder.finish("FINISHED", [report])
    assert not recorder.behind

    moved = tmp_path / "elsewhere" / "after"
    shutil.copytree(out, moved)
    shutil.rmtree(out)
    with mlflow_ui(moved) as address:
        query = {"experiment_ids": ["1"], "max_results": 10}
        found = json.loads(fetch(f"{address}/api/2.0/mlflow/runs/search", query))["runs"]
        by_name = {run["info"]["run_name"]: run["info"] for run in found}
        assert set(by_name) == {"digits", "trial-000 bops: uniform 4"}
        assert {info["status"] for info in by_name.values()} == {"FINISHED"}

        def artifact(run: str, path: str) -> bytes:
            query = urllib.parse.urlencode({"path": path, "run_id": by_name[run]["run_id"]})
            return fetch(f"{address}/get-artifact?{query}")

        assert artifact("digits", "report.html").decode() == "<p>größe</p>"
        bits = json.loads(artifact("trial-000 bops: uniform 4", "bits.json"))
        assert bits == layers(0)
        run_id = by_name["digits"]["run_id"]
        listing = json.loads(fetch(f"{address}/api/2.0/mlflow/artifacts/list?run_id={run_id}"))
        assert [file["path"] for file in listing["files"]] == ["report.html"]
