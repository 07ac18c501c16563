"""`sync` sends missing data to the tracking server exactly once."""

from __future__ import annotations

import pytest
from mlflow.tracking import MlflowClient

from nipq_search.cli import main
from nipq_search.search.jobs.lease import driver_lease
from nipq_search.search.results.sweep import Sweep


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An external database, set by `MLFLOW_TRACKING_URI`."""
    uri = f"sqlite:///{tmp_path / 'tracking.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def runs(uri):
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client, client.search_runs(experiments)


def test_a_server_that_was_unavailable_gets_everything_once(sweep_copy, server, capsys):
    for _ in range(2):
        assert main(["sync", str(sweep_copy)]) == 0
        assert "is up to date: 5 trials" in capsys.readouterr().err
    client, found = runs(server)
    (parent,) = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
    children = {r.data.tags["nipq.trial"]: r for r in found if r is not parent}
    assert parent.info.status == "FINISHED" and "hypervolume" in parent.data.metrics
    assert len(found) == 6 and children.keys() == {"0", "1", "2", "3", "4"}
    for trial in Sweep.open(sweep_copy).trials():
        run = children[str(trial.trial)]
        assert run.info.status == "FINISHED"
        assert run.data.metrics["validation"] == trial.validation
        history = client.get_metric_history(run.info.run_id, "train_loss")
        assert len(history) == 1, "each point was sent once"
        assert run.data.tags["on_front"] == str(trial.on_front).lower()


def test_an_unavailable_server_is_a_one_line_error(sweep_copy, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    assert main(["sync", str(sweep_copy)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the tracking server http://127.0.0.1:9 did not respond")
    assert "secret" not in error


def test_a_running_sweep_syncs_by_itself(sweep_copy, server, capsys):
    with driver_lease(sweep_copy):
        assert main(["sync", str(sweep_copy)]) == 2
    assert "a driver is running this sweep" in capsys.readouterr().err
