from __future__ import annotations

import dataclasses
import logging
import math
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from made_up_sweep import START, complete, curve, failed, layers, running
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from nipq_search.records import CurvePoint
from nipq_search.tracking import MlflowRecorder, server

CONFIG = {"seed": 0, "search": {"trials": 4}, "budgets": [{"bops": "uniform 4"}, {"bops": 3e6}]}
DATASET = {"name": "digits", "digest": "ab" * 32, "train": 1000}


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An empty MLflow database, copied by each test because creating one takes seconds."""
    folder = tmp_path_factory.mktemp("empty")
    server.open_client(server.local_uri(folder))
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture
def out(tmp_path: Path, database: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep's folder with an empty database, without a server in the environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(database)
    return folder


def begin(out: Path, sweep: str = "digits", config: Any = None, **options: Any) -> MlflowRecorder:
    recorder = MlflowRecorder(out, sweep, **options)
    recorder.begin(config or CONFIG, {"team": "vision"}, DATASET)
    return recorder


def runs(out: Path) -> tuple[list[Run], dict[int, Run]]:
    """Return the parent runs, and the children by trial number; fail on duplicate children."""
    client = server.open_client(server.local_uri(out))
    found = list(client.search_runs(["1"]))
    children = [run for run in found if "nipq.trial" in run.data.tags]
    numbers = [int(run.data.tags["nipq.trial"]) for run in children]
    assert len(set(numbers)) == len(numbers)
    return [run for run in found if run not in children], dict(zip(numbers, children, strict=True))


def steps(out: Path, run: Run, key: str) -> list[int]:
    client = server.open_client(server.local_uri(out))
    return sorted(metric.step for metric in client.get_metric_history(run.info.run_id, key))


class Calls:
    """Counts the write calls of every MLflow client and forwards them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in ("log_batch", "create_run", "update_run", "set_terminated", "set_tag"):
            monkeypatch.setattr(MlflowClient, name, self.counted(name))

    def counted(self, name: str) -> Any:
        original = getattr(MlflowClient, name)

        def call(*args: Any, **options: Any) -> Any:
            self.names.append(name)
            return original(*args, **options)

        return call


def test_a_sweep_is_a_parent_with_a_child_per_trial(out: Path) -> None:
    recorder = begin(out)
    recorder.record(complete(0, front=True), curve(0), layers(0))
    recorder.record(dataclasses.replace(complete(1), state="PRUNED"), curve(1, 1))
    recorder.record(failed(2), [])
    recorder.record(running(3), curve(3, 1))
    (out / "front.json").write_text("{}")
    recorder.finish("KILLED", [out / "front.json", out / "absent.html"], {"hypervolume": 0.7})
    assert not recorder.behind

    (parent,), children = runs(out)
    assert parent.info.run_name == "digits"
    assert parent.info.status == "KILLED"
    assert parent.data.tags["team"] == "vision"
    assert parent.data.tags["mlflow.user"]
    assert parent.data.params["budgets.1.bops"] == "3000000.0"
    assert parent.data.metrics == {"hypervolume": 0.7}
    assert parent.inputs is not None
    (data,) = parent.inputs.dataset_inputs
    assert (data.dataset.name, data.tags[0].value) == ("digits", "training")

    states = {number: run.info.status for number, run in children.items()}
    assert states == {0: "FINISHED", 1: "FINISHED", 2: "FAILED", 3: "KILLED"}
    first = children[0]
    assert first.info.run_name == "trial-000 bops: uniform 4"
    assert first.info.start_time == 1000 * START
    assert first.info.end_time == 1000 * (START + 50)
    assert first.data.params["lr"] == "0.01"
    expected = {"budget": "bops: uniform 4", "lambda": "10", "strategy": "ladder"}
    expected |= {"on_front": "true", "nipq.state": "COMPLETE"}
    assert expected.items() <= first.data.tags.items()
    assert first.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert first.data.metrics["cost_bops"] == 0.98e6 * 16
    assert first.data.metrics["test"] == first.data.metrics["validation"] - 0.01
    assert steps(out, first, "train_loss") == [1, 2, 3]
    assert children[1].data.tags["nipq.state"] == "PRUNED"
    assert children[2].data.tags["reason"] == "loss became NaN at step 7"


def test_a_resume_creates_no_duplicates(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = begin(out)
    recorder.record(complete(0), curve(0), layers(0))
    recorder.record(running(1), curve(1, 2))
    # The driver dies without `finish`. Another one resumes, and epoch 2 of trial 1 is repeated.
    more = {**CONFIG, "search": {"trials": 8}}
    resumed = begin(out, config=more)
    calls = Calls(monkeypatch)
    resumed.record(complete(0), curve(0), layers(0))
    assert calls.names == []
    resumed.record(complete(1), [*curve(1, 1), *curve(1, 3, late=60)[1:]], layers(1))
    for _ in range(2):
        resumed.finish("FINISHED", [], {"hypervolume": 0.7})

    (parent,), children = runs(out)
    assert parent.data.params["search.trials"] == "4"
    assert parent.data.tags["now.search.trials"] == "8"
    assert parent.info.status == "FINISHED"
    assert steps(out, parent, "hypervolume") == [0]
    for number in (0, 1):
        assert children[number].info.status == "FINISHED"
        for key in ("train_loss", "validation_accuracy"):
            assert steps(out, children[number], key) == [1, 2, 3]
        assert steps(out, children[number], "validation") == [0]


def test_an_interrupted_trial_is_resumed_and_ends(out: Path) -> None:
    first = begin(out)
    first.record(running(0), curve(0, 1))
    first.finish("KILLED")
    assert runs(out)[1][0].info.status == "KILLED"
    second = begin(out)
    assert runs(out)[0][0].info.status == "RUNNING"
    second.record(running(0), curve(0, 2))
    assert runs(out)[1][0].info.status == "RUNNING"
    # This driver is killed as well; a later `sync` leaves no run RUNNING.
    begin(out).finish("FAILED")
    (parent,), children = runs(out)
    assert (parent.info.status, children[0].info.status) == ("FAILED", "KILLED")


def test_repeated_records_send_only_what_is_new(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = begin(out)
    calls = Calls(monkeypatch)
    recorder.record(running(0), curve(0, 1))
    assert calls.names == ["create_run", "log_batch"]
    recorder.record(running(0), curve(0, 1))
    assert calls.names == ["create_run", "log_batch"]
    recorder.record(running(0), curve(0, 2))
    assert calls.names == ["create_run", "log_batch", "log_batch"]
    recorder.record(complete(0), curve(0, 3))
    assert calls.names[3:] == ["set_terminated", "log_batch"]
    recorder.record(complete(0), curve(0, 3))
    assert len(calls.names) == 5


def test_changes_of_the_front_update_the_tags(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = begin(out)
    for number in range(3):
        recorder.record(complete(number, front=number == 0), [])
    calls = Calls(monkeypatch)
    recorder.update_front({0, 2})
    recorder.update_front({0, 2})
    assert calls.names == ["log_batch"]
    recorder.record(complete(1, front=True), [])  # `update_front` overrides the record
    fronts = {number: run.data.tags["on_front"] for number, run in runs(out)[1].items()}
    assert fronts == {0: "true", 1: "false", 2: "true"}
    again = begin(out)
    again.update_front({1})
    fronts = {number: run.data.tags["on_front"] for number, run in runs(out)[1].items()}
    assert fronts == {0: "false", 1: "true", 2: "false"}


def test_sweeps_of_the_same_name_are_separate_on_a_server(out: Path) -> None:
    uri = server.local_uri(out)
    for folder in ("a", "b", "a"):
        recorder = begin(out.parent / folder, uri=uri, identity=folder)
        recorder.record(complete(0), curve(0))
        recorder.finish("FINISHED")
    client = server.open_client(uri)
    found = client.search_runs(["1"])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["digits", "digits"]
    assert len(found) == 4


def test_odd_names_and_values_are_recorded(out: Path) -> None:
    name = "größe 'é' \"日本\" </script>"
    recorder = begin(out, sweep=name)
    trial = dataclasses.replace(
        complete(0),
        budget_label="bops: ½ 'x'",
        params={"lr/π": 0.1, "note": "x" * 9000, "lambda": None},
        metrics={"acc@1 / top": 0.5, "loss": math.nan, "bad": math.inf},
        reason="y" * 9000,
    )
    points = [
        CurvePoint(epoch=1, step=1, phase="noise", timestamp=START, metrics={"loss": math.nan})
    ]
    recorder.record(trial, points)
    begin(out, sweep=name).record(trial, points)
    assert not recorder.behind
    (parent,), children = runs(out)
    assert parent.info.run_name == name
    assert children[0].data.params["lr_π"] == "0.1"
    assert len(children[0].data.params["note"]) == 500
    assert children[0].data.metrics["metrics_acc_1 _ top"] == 0.5
    assert math.isnan(children[0].data.metrics["metrics_loss"])
    assert steps(out, children[0], "loss") == [1]
    assert steps(out, children[0], "metrics_loss") == [0]


def test_many_values_are_sent_in_batches(out: Path) -> None:
    config = {f"key{number}": number for number in range(250)}
    recorder = begin(out, config=config)
    points = [
        CurvePoint(
            epoch=epoch,
            step=epoch,
            phase="noise",
            timestamp=START + epoch,
            metrics={f"m{number}": 0.0 for number in range(10)},
        )
        for epoch in range(1, 102)
    ]
    recorder.record(complete(0), points)
    assert not recorder.behind
    (parent,), children = runs(out)
    assert len(parent.data.params) == 250
    assert len(steps(out, children[0], "m9")) == 101


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def test_an_unavailable_server_neither_raises_nor_blocks_the_search(
    tmp_path: Path, closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"http://somebody:secret@127.0.0.1:{closed_port}"
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="nipq_search"):
        recorder = begin(tmp_path, uri=uri)
        for number in range(20):
            recorder.record(complete(number), curve(number))
        recorder.update_front({1})
        recorder.finish("FINISHED")
    assert time.monotonic() - start < 60
    assert recorder.behind
    ours = [record.getMessage() for record in caplog.records if record.name == "nipq_search"]
    assert len(ours) == 1
    assert "secret" not in ours[0]


def test_unsent_data_are_sent_once_the_server_is_back(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = begin(out, retry_seconds=0)
    recorder.record(running(0), curve(0, 1))

    def away(*args: Any, **options: Any) -> None:
        raise ConnectionError("server away")

    with monkeypatch.context() as broken:
        for name in ("log_batch", "search_runs", "create_run"):
            broken.setattr(MlflowClient, name, away)
        recorder.record(complete(0), curve(0), layers(0))
        recorder.record(complete(1), curve(1))
        recorder.update_front({1})
        assert recorder.behind
    recorder.record(complete(2), curve(2))
    assert not recorder.behind
    _, children = runs(out)
    assert sorted(children) == [0, 1, 2]
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert steps(out, children[0], "train_loss") == [1, 2, 3]
    assert children[1].data.tags["on_front"] == "true"


def test_creating_a_database_logs_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "größe"
    recorder = begin(out, uri=server.local_uri(out), identity="x")
    recorder.finish("FINISHED")
    assert not recorder.behind
    assert (out / "mlflow.db").is_file()
    assert capfd.readouterr() == ("", "")
