"""Tests of the front benchmark: exact sample counts, resuming, and consistent tables."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
sys.path.append(str(ROOT / "tests" / "search"))

import front  # noqa: E402
import front_figures as figures  # noqa: E402
from sweep_helpers import warm_start  # noqa: E402

ALLOWANCE = 9_000
METHODS = ["fill", "independent", "lsq ilp", "nsga2"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run the quick benchmark of four methods twice, with a loader that counts samples."""
    folder = tmp_path_factory.mktemp("front")
    plan = yaml.safe_load((BENCHMARKS / "front.yaml").read_text())
    plan["quick"]["seeds"] = [0]
    plan["quick"]["allowance"] = ALLOWANCE
    plan["quick"]["set"] |= {"task": "counting_digits:CountingDigits", "task_args.width": 4}
    plan["quick"]["set"]["float.epochs"] = 2
    (folder / "front.yaml").write_text(yaml.safe_dump(plan))
    page = folder / "page.md"
    page.write_text(
        "".join(f"<!-- front-{n} -->\n<!-- /front-{n} -->\n" for n in ("volumes", "accuracies"))
    )
    warm = warm_start()
    environment = {
        **os.environ,
        **warm,
        "COUNTED": str(folder / "counted"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT), warm["PYTHONPATH"]]),
    }
    command = [sys.executable, str(BENCHMARKS / "front.py"), str(folder / "front.yaml"), "--quick"]
    command += ["--json", str(folder / "front.json"), "--workers", "2", "--page", str(page)]
    command += ["--plot", str(folder / "front.svg"), "--only", *METHODS]

    def run():
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "front.json").read_text())

    results = run()
    counted = sum(int(line) for line in (folder / "counted").read_text().split())
    again = run()
    after = sum(int(line) for line in (folder / "counted").read_text().split())
    return folder, results, counted, (again, after)


def test_samples_are_those_that_the_loader_handed_out(ran):
    _, results, counted, _ = ran
    floats = {r["seed"]: r["samples"] for r in results if r["method"] == "float"}
    runs = [r for r in results if r["method"] != "float"]
    assert len(runs) == len(METHODS)
    said = sum(floats.values()) + sum(r["total_samples"] - floats[r["seed"]] for r in runs)
    assert said == counted
    for run in runs:
        parts = run["float"]["samples"] + run["scoring_samples"]
        assert run["total_samples"] == parts + sum(p["samples"] for p in run["points"])
        assert run["points"][-1]["ended_at"] == run["total_samples"]
        assert (run["scoring_samples"] > 0) == (run["method"] == "lsq ilp")


def test_every_method_had_the_same_allowance_and_used_it_up(ran):
    _, results, _, _ = ran
    for run in results:
        if run["method"] != "float":
            last = run["points"][-1]
            assert run["total_samples"] >= ALLOWANCE > run["total_samples"] - last["samples"]
            assert all(p["ended_at"] <= ALLOWANCE for p in figures.kept(run, ALLOWANCE))


def test_a_second_run_repeats_nothing(ran):
    _, results, counted, (again, after) = ran
    assert (again, after) == (results, counted)


def test_the_methods_are_what_they_are_called(ran):
    folder, results, _, _ = ran
    runs = {r["method"]: r for r in results if r.get("seed") == 0}
    assert all(p["parent"] is None for p in runs["independent"]["points"])
    assert any(p["parent"] is not None for p in runs["fill"]["points"])
    genes = [p["params"] for p in runs["nsga2"]["points"]]
    assert all(sum(name.startswith("bits.") for name in params) > 8 for params in genes)
    for method, run in runs.items():
        if method == "float":
            continue
        targets = run["budgets"].values()
        for point in figures.kept(run, math.inf):
            assert point["cost"] <= max(targets)
            assert point["test"] is not None or point not in figures.front(run, math.inf)


def test_tables_and_plot(ran):
    folder, results, _, _ = ran
    page = (folder / "page.md").read_text()
    for method in METHODS:
        assert page.count(f"| {method} |") == 2
    assert (folder / "front.svg").read_text().startswith("<?xml")


def test_a_changed_plan_does_not_take_old_results_for_its_own(ran):
    folder, results, _, _ = ran
    plan = front.read_plan(folder / "front.yaml", quick=True)
    plan["methods"] = {name: plan["methods"][name] for name in METHODS}
    plan["allowance"] += 1
    with pytest.raises(front.UserError, match="belong to a different plan"):
        front.run_all(plan, results, folder / "front", 1, lambda: None)


def test_a_killed_float_training_is_counted_before_and_after(tmp_path, monkeypatch):
    sys.path.insert(0, str(Path(__file__).parent))
    plan = front.read_plan(BENCHMARKS / "front.yaml", quick=True)
    plan["set"] |= {"task": "counting_digits:CountingDigits", "name": "x"}
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))
    unit = front.Unit(plan, front.FLOAT, 0, tmp_path / "float")

    class Killed(BaseException):
        pass

    from nipq_search.train.loop import Trainer

    step = Trainer._train_step

    def killed(self, group):
        if self.step == 30:
            raise Killed
        step(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", killed)
        with pytest.raises(Killed):
            front.train_float(unit)
    result = front.train_float(unit)
    counted = [int(line) for line in (tmp_path / "counted").read_text().split()]
    whole = 4 * sum(counted[:18])  # four epochs, without the work repeated after the kill
    assert whole <= result["samples"] <= sum(counted)
    assert front.train_float(unit) == result


def test_an_interrupted_sweep_starts_over(tmp_path, monkeypatch):
    """Otherwise, repeated work would use up the method's allowance."""
    plan = front.read_plan(BENCHMARKS / "front.yaml", quick=True)
    plan = {**plan, "allowance": 9_000}
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))
    trained = front.train_float(front.Unit(plan, front.FLOAT, 0, tmp_path / "float"))
    unit = front.Unit(plan, "lsq uniform", 0, tmp_path / "lsq")

    class Killed(BaseException):
        pass

    from nipq_search.train.loop import Trainer

    step, steps = Trainer._train_step, []

    def killed(self, group):
        steps.append(group)
        if len(steps) == 30:  # in the second trial
            raise Killed
        step(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", killed)
        with pytest.raises(Killed):
            front.execute(unit, trained)
    result = front.execute(unit, trained)
    processed = [p["samples"] for p in result["points"]]
    assert len({*processed}) == 1, "each trial was trained once"
    assert result["total_samples"] == trained["samples"] + sum(processed)


def test_the_summary_has_the_figures_of_the_tables(ran):
    folder, results, _, _ = ran
    plan = front.read_plan(folder / "front.yaml", quick=True)
    said = json.loads((folder / "front.summary.json").read_text())["methods"]
    for run in results:
        if run["method"] != "float":
            own = said[run["method"]]
            assert own["hypervolume"] == {"0": figures.volume(run, plan["allowance"])}
            for label, cost in run["budgets"].items():
                found = figures.accuracy_at(run, cost, plan["allowance"])
                assert own["metric_within_budget"][label] == [found]
    assert said["independent"]["share_to_reach_goal"][0] <= 1


def test_results_of_another_plan_are_not_tabulated_either(ran, capsys):
    folder, _, _, _ = ran
    plan = yaml.safe_load((folder / "front.yaml").read_text())
    plan["quick"]["allowance"] += 1000
    (folder / "longer.yaml").write_text(yaml.safe_dump(plan))
    argv = [str(folder / "longer.yaml"), "--quick", "--json", str(folder / "front.json"), "--only"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["front.py", *argv])
        with pytest.raises(SystemExit, match="belong to a different plan"):
            front.main()


def made_up(method, seed, *points):
    """Return a run with (samples, cost, validation, test) points and a cost axis from 1 to 16."""
    found = [
        {
            "trial": n,
            "state": "COMPLETE",
            "cost": cost,
            "validation": validation,
            "test": test,
            "samples": 10,
            "ended_at": end,
            "seconds": 1.0,
        }
        for n, (end, cost, validation, test) in enumerate(points)
    ]
    return {
        "method": method,
        "seed": seed,
        "mode": "max",
        "axis": [1, 16],
        "budgets": {"small": 2, "large": 8},
        "float": {"validation": 1.0, "test": 1.0, "samples": 5},
        "points": found,
    }


def test_volume_curve_and_reach():
    slow = made_up("a", 0, (100, 4, 0.9, 0.9), (200, 1, 0.9, 0.9))
    fast = made_up("b", 0, (50, 1, 0.95, 0.92), (150, 2, 0.94, 0.99))
    assert figures.volume(slow, 100) == pytest.approx(0.5 * 0.5)
    assert figures.volume(slow, 99) == 0.0
    assert figures.curve(slow, 150) == [(100, pytest.approx(0.25))]
    # The second point of `fast` is dominated on validation, although it is better on test.
    assert figures.volume(fast, 200) == pytest.approx(0.6)
    assert figures.samples_to(fast, figures.volume(slow, 200), 200) == 50
    assert figures.samples_to(slow, 0.9, 200) is None
    assert figures.accuracy_at(fast, 2, 200) == 0.92
    assert figures.accuracy_at(slow, 0.5, 200) is None


def test_intervals_are_of_paired_means():
    mean, low, high = figures.bootstrap([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2) and 0.1 <= low < 0.2 < high <= 0.3
    assert figures.bootstrap([0.5] * 5) == (0.5, 0.5, 0.5)


def test_a_wrong_plan_is_refused_before_anything_runs(tmp_path, capsys):
    plan = yaml.safe_load((BENCHMARKS / "front.yaml").read_text())
    plan["methods"]["broken"] = {"search.strategy": "laddr"}
    with pytest.raises(front.UserError, match="did you mean 'ladder'"):
        front.run_all(plan, [], tmp_path, 1, lambda: None)
    assert not any(tmp_path.iterdir())
