"""Sweep files: parsing, and one-line errors for invalid entries."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from unit_helpers import document, make_config, run_here

from nipq_search.errors import UserError
from nipq_search.search.commands.plan import plan
from nipq_search.search.config.resume import check_resume, differences
from nipq_search.search.config.sweep_config import (
    SweepConfig,
    load_config,
    parse_config,
)
from nipq_search.search.coordinator.resolved import resolve_sweep
from nipq_search.search.results.sweep import Sweep
from nipq_search.tasks import TASKS, make_task

PIPELINES = sorted((Path(__file__).parents[3] / "pipelines").glob("*.yaml"))


def refused(given, *fragments):
    """Check that a document is rejected with a one-line message that contains all fragments."""
    with pytest.raises(UserError) as caught:
        parse_config(given, "sweep.yaml")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("sweep.yaml: ")
    for fragment in fragments:
        assert fragment in message
    return message


@pytest.mark.parametrize(
    ("key", "misspelt", "known"),
    [
        ("", "budgts", "budgets"),
        ("", "floats", "float"),
        ("float", "epoch", "epochs"),
        ("quant", "quantiser", "quantizer"),
        ("quant.weights", "bit", "bits"),
        ("quant.weights", "granularty", "granularity"),
        ("quant.activations", "percentil", "percentile"),
        ("train", "lamda", "lambda"),
        ("train", "batchsize", "batch_size"),
        ("search", "sampeler", "sampler"),
        ("search", "trails", "trials"),
        ("resources", "cpu", "cpus"),
        ("limits", "hour", "hours"),
    ],
)
def test_misspelled_keys_suggest_the_nearest(key, misspelt, known):
    given = document()
    place = given
    for part in key.split(".") if key else []:
        place = place.setdefault(part, {})
    place[misspelt] = 1
    full = f"{key}.{misspelt}" if key else misspelt
    refused(given, f" {full}: unknown key", f"did you mean '{known}'")


def test_an_unknown_key_without_a_near_match_lists_the_valid_ones():
    refused(document(limits__zzzzz=1), "limits.zzzzz: unknown key", "hours", "trial_minutes")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"name": ""}, ["name: "]),
        ({"name": "a/b"}, ["name: "]),
        ({"seed": "zero"}, ["seed: ", "'zero'"]),
        ({"task_args": [1]}, ["task_args: "]),
        ({"budgets": []}, ["budgets: "]),
        ({"budgets": [{}]}, ["budgets: an entry is empty"]),
        ({"budgets": [{"bop": 3}]}, ["budgets: unknown cost 'bop'", "did you mean 'bops'"]),
        ({"budgets": [{"bops": "uniform"}]}, ["budgets.bops: 'uniform' is not a budget"]),
        ({"budgets": [{"bops": -1}]}, ["budgets.bops: -1 is not allowed; use a number above 0"]),
        ({"budgets": [{"bops": 5}, {"bops": 5}]}, ["duplicate budget"]),
        ({"float": {"epochs": -1}}, ["float.epochs: must be above 0"]),
        ({"float": {"epochs": "many"}}, ["float.epochs: ", "'many'"]),
        ({"quant__quantizer": "nip"}, ["quant.quantizer: ", "did you mean 'nipq'"]),
        ({"quant__weights": {"bits": [1, 2]}}, ["quant.weights.bits: "]),
        ({"quant__weights": {"bits": "four"}}, ["quant.weights.bits", "'four'"]),
        ({"quant__weights": {"granularity": "per_row"}}, ["quant.weights.granularity"]),
        ({"quant__activations": {"bits": [17]}}, ["quant.activations.bits: 17"]),
        ({"quant__pin": {"stem": "int8"}}, ["quant.pin.stem"]),
        ({"train__lambda": -1}, ["train.lambda: must not be negative"]),
        ({"train__lambda": "big"}, ["train.lambda: ", "'big'"]),
        ({"train__noise_share": 2}, ["train.noise_share: must be between 0 and 1"]),
        ({"train__proxy": "normal"}, ["train.proxy: unknown value 'normal'"]),
        ({"search__bits": True, "train__start": "uniform"}, ["search.bits", "train.start"]),
        ({"search__strategy": "independant"}, ["search.strategy", "'independent'"]),
        ({"search__sampler": "tpee"}, ["search.sampler", "did you mean 'tpe'"]),
        ({"search__trials": 0}, ["search.trials: ", "got 0"]),
        ({"search__trials": 1.5}, ["search.trials: ", "1.5"]),
        ({"search__baselines": [1]}, ["search.baselines: 1 is not a valid baseline bit-width"]),
        ({"search__baselines": [4, 4]}, ["search.baselines: duplicate bit-width"]),
        ({"search__front_cost": "flops"}, ["search.front_cost: unknown cost 'flops'"]),
        ({"search__space": {"lrr": {"log": [1, 2]}}}, ["search.space.lrr", "did you mean 'lr'"]),
        ({"search__space": {"lr": {"logg": [1, 2]}}}, ["search.space.lr: give one of log"]),
        ({"search__space": {"lr": {"log": [2, 1]}}}, ["search.space.lr.log: give two numbers"]),
        ({"search__space": {"lr": 0.1}}, ["search.space.lr: give a range", "train.lr"]),
        ({"search__space": {"lr": {"log": 3}}}, ["search.space.lr.log: give a list"]),
        ({"search__space": {"lr": {"log": [0, 1]}}}, ["search.space.lr.log: both"]),
        ({"search__space": {"lr": {"choice": []}}}, ["search.space.lr.choice: give at least"]),
        ({"search__space": {"noise_share": {"uniform": [0, 2]}}}, ["noise_share: 2.0 is not"]),
        ({"search__space": {"proxy": {"choice": ["normal"]}}}, ["search.space.proxy: 'normal'"]),
        ({"search__space": {"lr": {"choice": ["fast"]}}}, ["search.space.lr: 'fast'"]),
        ({"resources": {"cpus": 0}}, ["resources.cpus: "]),
        ({"resources": {"gpus": -1}}, ["resources.gpus: "]),
        ({"limits": {"hours": 0}}, ["limits.hours: "]),
        ({"limits": {"max_failures": 0}}, ["limits.max_failures: "]),
        ({"limits": 5}, ["limits: "]),
    ],
)
def test_wrong_values_name_their_key(changes, fragments):
    refused(document(**changes), *fragments)


@pytest.mark.parametrize("key", ["name", "task", "budgets"])
def test_missing_keys_are_named(key):
    given = document()
    del given[key]
    refused(given, f"{key}: this key is missing")


@pytest.mark.parametrize("given", [None, [], "text", 3])
def test_a_sweep_file_is_a_mapping(given):
    refused(given, "a sweep file is a mapping")


def write(folder, text):
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


BASE = "name: x\ntask: digits\nbudgets: [{bops: uniform 4}]\n"


def test_yaml_numbers_are_numbers(tmp_path):
    text = BASE + "train: {lr: 1e-3, weight_decay: 2E4, momentum: 0.5}\nlimits: {samples: 1_000}\n"
    config = load_config(write(tmp_path, text))
    assert (config.train.lr, config.train.weight_decay) == (1e-3, 2e4)
    assert config.limits.samples == 1000


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (BASE + "name: y\n", ["line 4", "duplicate key 'name'"]),
        (BASE + "train: {lr: 1, lr: 2}\n", ["line 4", "duplicate key 'lr'"]),
        (BASE + "train: [\n", ["line 5"]),
        (BASE + "name:\ty: z: [\n", ["line "]),
        ("- a\n- b\n", ["is a mapping"]),
        ("", ["is a mapping"]),
    ],
)
def test_broken_files_name_file_and_line(text, fragments, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:") and "\n" not in message
    assert all(fragment in message for fragment in fragments)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_overrides_from_the_command_line(tmp_path):
    path = write(tmp_path, BASE)
    config = load_config(
        path,
        [
            "search.trials=8",
            "train.lr=1e-2",
            "train.lambda=3",
            "budgets.0.bops=uniform 2.5",
            "search.space={lr: {log: [0.01, 0.1]}}",
            "search.space.lambda.choice=[1, 2]",
            "search.baselines=[8, 2]",
            "quant.pin={'head*': 8}",
            "limits.hours=null",
            "task_args.width=4",
        ],
    )
    assert config.search.trials == 8 and config.search.baselines == (8, 2)
    assert (config.train.lr, config.train.lambda_) == (1e-2, 3)
    assert config.budgets == [{"bops": "uniform 2.5"}]
    assert config.search.space == {"lr": {"log": [0.01, 0.1]}, "lambda": {"choice": [1, 2]}}
    assert config.quant.pin == {"head*": 8} and config.limits.hours is None
    assert config.task_args == {"width": 4}
    assert load_config(path, ["budgets=[{bops: 5}, {weight_bytes: 7}]"]).budgets[1] == {
        "weight_bytes": 7
    }


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("search.trials", "write KEY=VALUE"),
        ("=3", "write KEY=VALUE"),
        ("search.trials=[", "not valid YAML"),
        ("name.first=x", "name is not a section"),
        ("budgets.7.bops=3", "budgets has entries 0 to 0"),
        ("search.trails=3", "search.trails: unknown key (did you mean 'trials'?)"),
    ],
)
def test_wrong_overrides(override, fragment, tmp_path):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, BASE), [override])
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__lambda": 3, "train__proxy": "empirical", "limits": {"hours": 2}},
        {"quant": {"pin": {"head*": 8, "stem": "float"}, "weights": {"start": "mse"}}},
        {"float": {"checkpoint": "float.pt"}, "search__front_cost": "weight_bytes"},
    ],
)
def test_the_resolved_configuration_reads_back(changes):
    config = make_config(**changes)
    resolved = config.as_json()
    assert resolved["train"]["lambda"] == config.train.lambda_
    assert parse_config(resolved) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(resolved))) == config
    assert parse_config(resolved).as_json() == resolved


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_shipped_sweep_builds(path):
    config = load_config(path)
    assert isinstance(config, SweepConfig) and config.task in TASKS
    task = make_task(config.task, config.task_args)
    facts = resolve_sweep(config, task)
    assert len(facts.budgets) == len(config.budgets)


def test_there_are_shipped_sweeps():
    assert PIPELINES


@pytest.mark.parametrize(
    "changes",
    [
        {"budgets": [{"weight_bytes": 9e9}, {"bops": "uniform 4"}, {"bops": "uniform 3"}]},
        {"search__trials": 40},
        {"search__trials": 1},
        {"resources": {"cpus": 2, "concurrent": 3}},
        {"limits": {"hours": 1, "samples": 5, "trial_minutes": 3, "max_failures": 1}},
    ],
)
def test_a_resume_may_change_the_extent(changes):
    check_resume(make_config().as_json(), make_config(**{"search__front_cost": "bops"} | changes))


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"seed": 6}, "seed: 5 -> 6"),
        ({"task_args": {"width": 8}}, "task_args.width: 4 -> 8"),
        ({"float": {"epochs": 1, "batch_size": 128}}, "float.epochs: 0.2 -> 1.0"),
        ({"quant__start_bits": 4}, "quant.start_bits: 8.0 -> 4.0"),
        ({"quant__pin": {"stem": 8}}, "quant.pin.stem: None -> 8"),
        ({"train__lambda": 3}, "train.lambda: 15.9 -> 3.0"),
        ({"search__sampler": "tpe"}, "search.sampler: 'random' -> 'tpe'"),
        ({"search__space": {}}, "search.space.lr"),
        ({"search__baselines": [8]}, "search.baselines: [4] -> [8]"),
        ({"search__reference": 0.5}, "search.reference: None -> 0.5"),
        ({"budgets": [{"bops": "uniform 4"}]}, "{'bops': 'uniform 3'} belongs to this sweep"),
        (
            {"budgets": [{"weight_bytes": 9}, {"bops": "uniform 4"}, {"bops": "uniform 3"}]},
            "front cost: 'bops' -> 'weight_bytes'",
        ),
    ],
)
def test_a_resume_rejects_other_changes(changes, fragment):
    with pytest.raises(UserError) as caught:
        check_resume(make_config().as_json(), make_config(**changes))
    assert fragment in str(caught.value) and "another name" in str(caught.value)


def test_differences_are_named_by_leaf():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}
    assert differences(old, new) == ["a.c: 2 -> 5", "d: 3 -> None", "e: None -> 4"]


def test_merge_keys_are_yaml_too(tmp_path):
    text = BASE + "float: &same {epochs: 2, batch_size: 32}\ntrain: {<<: *same, epochs: 3}\n"
    config = load_config(write(tmp_path, text))
    assert (config.train.batch_size, config.train.epochs) == (32, 3)


@pytest.mark.parametrize(
    "line", ["seed: !!int foo", "seed: 2020-99-01", "seed: " + "[" * 3000 + "]" * 3000]
)
def test_values_that_yaml_cannot_build_are_one_line(line, tmp_path):
    with pytest.raises(UserError, match="not valid YAML") as caught:
        load_config(write(tmp_path, BASE + line + "\n"))
    assert "\n" not in str(caught.value) and "sweep.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 90),
        ({"search__strategy": "fill"}, 0),
        ({"search__strategy": "fill", "train__epochs": 80}, 270),
        ({"quant__quantizer": "lsq"}, 0),
        ({"search__space": {"noise_share": {"uniform": [0.0, 0.25]}}}, 45),
    ],
)
def test_a_plan_reports_the_length_of_the_noise_phase(changes, steps):
    """The length is 0 if `fill` skips the phase, and for quantizers that do not learn bits."""
    long = {"train__epochs": 20, "train__noise_share": 0.5}
    assert plan(make_config(**long | changes))["noise_steps"] == steps


@pytest.mark.parametrize("start", ["budget", "sensitivity"])
def test_a_plan_reports_the_number_of_samples(start, tmp_path):
    """Calibration, scores, fitted ranges and normalization statistics are included."""
    config = make_config(
        float__epochs=1,
        train__epochs=1,
        train__start=start,
        train__fit_ranges=True,
        train__score_batches=2,
        search__strategy="independent",
        search__trials=2,
        search__baselines=[],
        search__space={"lr": {"log": [0.02, 0.1]}},
    )
    run_here(config, tmp_path / "sweep")
    processed = Sweep.open(tmp_path / "sweep").status()["total_samples"]
    assert processed == plan(config)["samples"]
