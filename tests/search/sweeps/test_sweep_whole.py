"""A whole sweep with the real command: its files, and adding trials to it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sweep_helpers import BIN, Command, Runs, attempts, results, states, study, trials, write_sweep

from nipq_search.cli import main
from nipq_search.cost import exact_cost
from nipq_search.quant.graph import Graph
from nipq_search.search.config.sweep_config import load_config
from nipq_search.search.coordinator.resolved import model_graph
from nipq_search.tasks import make_task

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
TRIALS = 4


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Command, str]:
    """A finished sweep and the output of its run."""
    folder = tmp_path_factory.mktemp("whole")
    write_sweep(folder, search__sampler="tpe", search__baselines=[4])
    command = Command(folder)
    return command, command.run().stdout


@pytest.fixture(scope="module")
def front(sweep: tuple[Command, str]) -> dict[str, Any]:
    return sweep[0].document("front", "out")


def optuna(command: Command, *arguments: str) -> Any:
    """Run `optuna` on the sweep's study and return its output as plain types."""
    done = subprocess.run(
        [BIN / "optuna", *arguments, "--storage", "out/study.log", "-f", "json"],
        cwd=command.folder,
        env=command.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


def test_the_front_is_printed_and_the_tables_can_be_read(
    sweep: tuple[Command, str], front: dict[str, Any]
) -> None:
    command, printed = sweep
    on_front = [p["trial"] for p in front["points"] if p["on_front"]]
    assert f"{len(on_front)} of {TRIALS} finished trials are on the front" in printed
    assert "float model" in printed and "LSQ uniform 4" in printed
    for key in ("sweep", "metric", "bops_convention", "front_cost", "hypervolume", "reference"):
        assert front[key] is not None
    assert len(front["points"]) == TRIALS
    assert states(command.out) == ["COMPLETE"] * TRIALS

    table = pd.read_parquet(command.out / "results.parquet")
    assert list(table["trial"]) == list(range(TRIALS))
    assert list(table.loc[table["on_front"], "trial"]) == sorted(on_front)
    curves = pd.read_parquet(command.out / "curves.parquet")
    assert set(curves["trial"]) == set(range(TRIALS))
    assert not curves.duplicated(["trial", "epoch"]).any()
    assert (command.out / "report.html").stat().st_size > 100_000
    command.no_orphans()


def recounted(graph: Graph, layers: list[dict[str, Any]]) -> dict[str, int]:
    """Return the bits by tensor, from the layers that `show` prints."""
    assert [layer["name"] for layer in layers] == [layer.name for layer in graph.layers]
    bits = {}
    for layer, shown in zip(graph.layers, layers, strict=True):
        for tensor, key in ((layer.weight, "weight_bits"), (layer.input, "activation_bits")):
            if tensor is not None and graph.tensors[tensor].allowed:
                assert shown[key] in graph.tensors[tensor].allowed
                assert bits.setdefault(tensor, shown[key]) == shown[key]
    assert bits.keys() == {name for name, tensor in graph.tensors.items() if tensor.allowed}
    return bits


def test_every_trial_keeps_its_budget_and_uses_it_up(
    sweep: tuple[Command, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, _ = sweep
    monkeypatch.chdir(command.folder)
    config = load_config(Path("sweep.yaml"))
    graph = model_graph(config, make_task(config.task, config.task_args))
    for trial in range(TRIALS):
        assert main(["show", "out", str(trial), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        bits = recounted(graph, shown["layers"])
        assert {name: exact_cost(name, graph, bits) for name in shown["cost"]} == shown["cost"]
        budget = shown["budget"]
        assert budget

        def used(
            bits: dict[str, int], budget: dict[str, float] = budget, graph: Graph = graph
        ) -> float:
            return max(exact_cost(name, graph, bits) / target for name, target in budget.items())

        assert used(bits) <= 1
        raises = [
            {**bits, name: width}
            for name, tensor in graph.tensors.items()
            for width in tensor.allowed
            if tensor.allowed and width > bits[name]
        ]
        assert used(bits) >= 0.97 or all(used(raised) > 1 for raised in raises)


def test_the_test_split_is_read_for_what_is_shown_alone(
    sweep: tuple[Command, str], front: dict[str, Any]
) -> None:
    command, _ = sweep
    shown = {p["trial"] for p in front["points"] if p["on_front"]}
    assert 1 <= len(shown)
    for point in front["points"]:
        assert (point["test"] is not None) == point["on_front"]
    assert front["float"]["test"] is not None
    assert [b["test"] is not None for b in front["baselines"]] == [True]
    tested = {path.parent for path in command.out.rglob("test.json")}
    expected = {command.out / "trials" / str(number) for number in shown}
    assert tested == expected | {command.out / "float", command.out / "baselines" / "lsq-4"}


def test_mlflow_has_a_run_for_the_sweep_and_one_for_each_trial(
    sweep: tuple[Command, str], front: dict[str, Any]
) -> None:
    runs = Runs(sweep[0].out)
    assert runs.parent == "FINISHED"
    assert runs.children == dict.fromkeys(range(TRIALS), "FINISHED")
    assert {"mlflow.user", "mlflow.source.name", "strategy"} <= runs.parent_tags.keys()
    for point in front["points"]:
        tags = runs.tags[point["trial"]]
        assert tags["on_front"] == str(point["on_front"]).lower()
        assert tags["budget"] == point["budget_label"]
        assert {"lambda", "strategy"} <= tags.keys()


def test_the_optuna_command_shows_the_same_trials(
    sweep: tuple[Command, str], front: dict[str, Any]
) -> None:
    command, _ = sweep
    (shown,) = optuna(command, "studies")
    assert (shown["name"], shown["n_trials"]) == ("tiny", TRIALS)
    listed = optuna(command, "trials", "--study-name", "tiny")
    points = {point["trial"]: point for point in front["points"]}
    assert {trial["number"] for trial in listed} == points.keys()
    for trial in listed:
        assert trial["state"] == "COMPLETE"
        point = points[trial["number"]]
        assert trial["values"]["accuracy"] == point["validation"]
        assert trial["values"]["bops"] == point["cost"]["bops"]
        assert trial["user_attrs"]["budget_slack"] <= 0
    best = optuna(command, "best-trials", "--study-name", "tiny")
    assert {t["number"] for t in best} == {n for n, p in points.items() if p["on_front"]}


def test_a_second_run_repeats_nothing_and_more_trials_and_budgets_go_on(
    sweep: tuple[Command, str], front: dict[str, Any]
) -> None:
    command, _ = sweep
    out = command.out
    before = results(out)
    command.run()
    assert results(out) == before
    assert command.document("front", "out") == front

    added = [*load_config(command.folder / "sweep.yaml").budgets, {"bops": "uniform 4.5"}]
    final = f"budgets={json.dumps(added)}"
    command.run("--trials", str(TRIALS + 2), "--set", final)
    assert states(out) == ["COMPLETE"] * (TRIALS + 2)
    assert before.items() <= results(out).items()
    assert all(len(attempts(out, number)) == 1 for number in range(TRIALS + 2))
    assert trials(out)[TRIALS].params["budget"] == 2  # the new budget comes first
    runs = Runs(out)
    assert runs.parent == "FINISHED"
    assert runs.children == dict.fromkeys(range(TRIALS + 2), "FINISHED")

    # The budgets of a sweep cannot be removed, and no other setting can be changed.
    decided = trials(out), study(out).user_attrs
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert "uniform 4.5" in command.run(code=2).stderr
    refused = command.run("--set", final, "--set", "train.lr=0.06", code=2)
    assert "train.lr: 0.05 -> 0.06" in refused.stderr
    now = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    # Opening the study adds an entry to Optuna's journal, but does not change the study.
    changed = {path.name for path in kept if now.get(path) != kept[path]}
    assert changed <= {"driver.lock", "study.log"} and now.keys() == kept.keys()
    assert (trials(out), study(out).user_attrs) == decided

    # Users can enqueue trials in the study of a finished sweep with Optuna itself.
    lr = trials(out)[0].params["lr"]
    study(out).enqueue_trial({"lr": 0.0321, "budget": 1}, user_attrs={"wish": "mine"})
    study(out).enqueue_trial({"lr": lr, "lambda": -5.0, "budget": 0})
    done = command.run("--trials", str(TRIALS + 2), "--set", final, code=3)
    assert states(out) == ["COMPLETE"] * (TRIALS + 3) + ["FAIL"]
    wished, wrong = trials(out)[-2:]
    assert wished.params["lr"] == 0.0321 and wished.params["budget"] == 1
    assert wished.user_attrs["wish"] == "mine"
    assert "lambda" in wrong.user_attrs["reason"]
    assert "1 failed" in done.stderr
    assert Runs(out).children[TRIALS + 3] == "FAILED"
