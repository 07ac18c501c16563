"""The documents of the read-only commands follow the contract."""

from __future__ import annotations

import json
import math

import pytest
from unit_helpers import Bench, make_config

from nipq_search.cost import COSTS
from nipq_search.errors import UserError
from nipq_search.search import jobs
from nipq_search.search.jobs.lease import driver_lease
from nipq_search.search.results import documents
from nipq_search.search.results.best import best_document
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.strategies.pareto import hypervolume

POINT = {
    "trial",
    "on_front",
    "budget",
    "budget_label",
    "cost",
    "validation",
    "test",
    "samples",
    "seconds",
    "parent",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A finished sweep of five trials, one of which failed."""
    bench = Bench(tmp_path_factory.mktemp("sweep"), make_config(search__trials=5))
    bench.fail = lambda job: "no luck" if job.name == "trial-002" else None
    bench.sweep()
    return bench


@pytest.fixture
def sweep(bench):
    return bench.view()


def test_front_document(bench, sweep):
    document = json.loads(json.dumps(sweep.front_document(), allow_nan=False))
    assert document.keys() == {
        "schema",
        "sweep",
        "metric",
        "bops_convention",
        "front_cost",
        "hypervolume",
        "test_hypervolume",
        "reference",
        "total_samples",
        "float",
        "baselines",
        "points",
    }
    assert (document["schema"], document["sweep"], document["bops_convention"]) == (1, "unit", 1)
    assert document["metric"] == {"name": "accuracy", "mode": "max"}
    assert document["front_cost"] == "bops"
    assert document["float"].keys() == {"validation", "test", "cost"}
    assert set(document["float"]["cost"]) == set(COSTS)
    assert document["total_samples"] == 700, "float, baseline and five trials; not the test split"
    assert [point.keys() for point in document["points"]] == [POINT] * 4
    assert [set(point["cost"]) for point in document["points"]] == [set(COSTS)] * 4
    costs = [point["cost"]["bops"] for point in document["points"]]
    assert costs == sorted(costs)
    front = {point["trial"] for point in document["points"] if point["on_front"]}
    assert front == {trial.number for trial in bench.ledger.study.best_trials}
    for point in document["points"]:
        assert (point["test"] is not None) == point["on_front"]
        assert point["budget"]["bops"] * 0.98 == pytest.approx(point["cost"]["bops"])
    assert document["baselines"][0]["bits"] == 4


def test_hypervolumes_of_the_front_document(bench, sweep):
    document = sweep.front_document()
    chosen = [p for p in document["points"] if p["on_front"]]
    options = {"axis": bench.facts.axis, "mode": "max"}
    points = [(p["validation"], p["cost"]["bops"]) for p in chosen]
    assert document["hypervolume"] == hypervolume(points, reference=0.72, best=0.9, **options)
    points = [(p["test"], p["cost"]["bops"]) for p in chosen]
    assert document["test_hypervolume"] == hypervolume(points, reference=0.4, best=0.5, **options)
    assert document["reference"]["metric"] == pytest.approx(0.72)


def test_a_configured_reference(bench):
    facts, records = bench.view().facts, bench.view().trials()
    config = make_config(search__reference=0.5).as_json()
    document = documents.front_document(records, facts, config, bench.out)
    assert document["reference"]["metric"] == document["reference"]["test_metric"] == 0.5
    assert document["test_hypervolume"] is None, "the float model is no better than the reference"


def test_status_document(sweep):
    document = json.loads(json.dumps(sweep.status()))
    assert document.keys() == {
        "schema",
        "sweep",
        "states",
        "driver",
        "stage",
        "total",
        "total_samples",
        "trials",
    }
    assert document["states"] == {
        "COMPLETE": 4,
        "PRUNED": 0,
        "FAIL": 1,
        "RUNNING": 0,
        "WAITING": 0,
    }
    assert document["driver"] is None and document["total"] == 5
    failed = document["trials"][2]
    assert (failed["state"], failed["reason"]) == ("FAIL", "no luck")
    with driver_lease(sweep.folder):
        live = sweep.status()
        assert live["driver"].keys() == {"host", "pid"}
        assert live["stage"] in ("float model", "baselines", "trials", "test split")


def test_show_document(sweep):
    document = json.loads(json.dumps(sweep.show(1)))
    assert {"schema", "trial", "layers", "state", "params", "budget", "cost"} <= document.keys()
    assert document["schema"] == 1 and document["trial"] == 1 and document["parent"] is None
    assert document["layers"] == [{"name": "stem", "kind": "conv", "weight_bits": 4}]
    assert sweep.show(2)["layers"] == [] and sweep.show(2)["reason"] == "no luck"
    for number in (-1, 5):
        with pytest.raises(
            UserError, match=rf"trial {number}: no such trial \(existing trials: 0 to 4\)"
        ):
            sweep.show(number)


def test_best_document(sweep):
    points = sweep.front_document()["points"]
    cheapest = min(point["cost"]["bops"] for point in points)
    document = sweep.best({"bops": 1e12})
    assert document.keys() == {"schema", "limits", "point", "nearest", "blocks", "model"}
    assert document["point"]["validation"] == max(point["validation"] for point in points)
    assert sweep.best({"bops": cheapest})["point"]["cost"]["bops"] == cheapest
    blocked = sweep.best({"bops": 0.9 * cheapest})
    assert blocked["point"] is None and blocked["nearest"]["cost"]["bops"] == cheapest
    (block,) = blocked["blocks"]
    assert "add a budget at or below the limit" in block
    least = sweep.facts["costs"]["bops"]["least"]
    assert f"the least reachable cost is {least:,.6g} (set by " in block
    least = sweep.best({"bops": 1.0, "weight_bytes": 1e12})
    assert "below the least reachable cost" in least["blocks"][0] and len(least["blocks"]) == 1
    with pytest.raises(
        UserError, match=r"--max bop: unknown cost \(did you mean 'bops'\?\); .* are bops, weight"
    ):
        sweep.best({"bop": 1.0})


def test_best_names_the_layers_that_set_the_least_cost(sweep):
    facts = {**sweep.facts, "least_set_by": {"bops": "stem: 80 %, head: 20 %"}}
    (block,) = best_document([], {"bops": 1.0}, facts)["blocks"][:1]
    assert block.endswith("with the allowed bit-widths (set by stem: 80 %, head: 20 %)")


def test_best_names_the_layers_that_make_up_most_of_the_nearest(sweep):
    points = sweep.front_document()["points"]
    rows = [
        {"name": name, "bops": cost} for name, cost in zip("abcd", (10, 60, 25, 5), strict=True)
    ]
    limit = {"bops": 0.9 * min(point["cost"]["bops"] for point in points)}
    (block,) = best_document(points, limit, sweep.facts, lambda trial: rows)["blocks"]
    assert " (most of it b: 60 %, c: 25 %, a: 10 %), " in block


def test_best_without_a_complete_trial(sweep):
    document = best_document([], {"bops": 1e12}, sweep.facts)
    assert document["point"] is None and document["blocks"] == ["no trial has completed yet"]


def test_best_of_a_metric_that_is_minimized(sweep):
    points = [
        {"trial": 0, "validation": 2.0, "cost": {"bops": 1.0}},
        {"trial": 1, "validation": 1.0, "cost": {"bops": 2.0}},
    ]
    facts = {**sweep.facts, "mode": "min"}
    assert best_document(points, {"bops": 5.0}, facts)["point"]["trial"] == 1


def test_records_of_every_state(bench, sweep):
    records = sweep.trials()
    assert [r.trial for r in records] == list(range(5))
    assert records[2].validation is None and records[2].samples == 100
    assert records[0].folder == "trials/0/attempt-1" and records[0].attempts == 1
    assert records[0].params.keys() == {"lr", "distill_weight"}
    assert all(r.started and r.ended and r.seconds == 1.5 for r in records)
    bench.ledger.study.enqueue_trial({"lr": 0.05})
    waiting = sweep.trials()[5]
    assert (waiting.state, waiting.started, waiting.folder) == ("WAITING", None, None)
    assert sweep.status()["states"]["WAITING"] == 1 and sweep.status()["total"] == 6


def test_the_front_as_a_table(sweep):
    table = sweep.front()
    assert list(table.columns[:2]) == ["trial", "budget"]
    assert {"bops", "validation", "test", "samples"} <= set(table.columns)
    assert table["bops"].is_monotonic_increasing
    assert all(math.isfinite(value) for value in table["test"])


def test_log_files_of_every_attempt(bench, sweep):
    attempt = jobs.attempts(bench.out / "trials" / "3")[0]
    (attempt / jobs.LOG).write_text("output\n")
    (attempt / jobs.TRACEBACK).touch()
    assert sweep.log_files(3) == [attempt / jobs.LOG]
    with pytest.raises(UserError, match="no such trial"):
        sweep.log_files(99)


def test_summary_for_the_report(sweep):
    summary = sweep.summary()
    assert (summary.name, summary.task, summary.metric, summary.mode) == (
        "unit",
        "digits",
        "accuracy",
        "max",
    )
    assert [baseline.bits for baseline in summary.baselines] == [4]
    assert summary.dataset["splits"]["train"] == 1097


@pytest.mark.parametrize("state", ["missing", "empty", "no facts", "damaged", "no mapping"])
def test_folders_without_a_sweep(state, bench, tmp_path):
    folder = tmp_path / "sweep"
    if state != "missing":
        folder.mkdir()
    if state in ("no facts", "damaged", "no mapping"):
        (folder / "sweep.yaml").write_text("a: [" if state == "damaged" else "text")
    if state in ("damaged", "no mapping"):
        (folder / "facts.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        Sweep.open(folder)
    message = str(caught.value)
    assert message.startswith(str(folder)) and "\n" not in message


def test_a_sweep_without_trials_yet(tmp_path, monkeypatch):
    bench = Bench(tmp_path / "new", make_config())
    bench.open()
    document = bench.view().front_document()
    assert document["points"] == [] and document["hypervolume"] is None
    assert bench.view().front().empty
    (bench.out / "study.log").unlink()
    assert bench.view().trials() == []
    with pytest.raises(UserError, match="none yet"):
        bench.view().show(0)
