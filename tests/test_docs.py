"""Comparison of the documentation with the code: settings, commands, JSON, files, links, snippets.

One sweep with the task and the sweep file of the README runs in this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pydantic
import pytest
import typer.main
import yaml

from nipq_search.cli import DEBUG, main
from nipq_search.cli.app import app
from nipq_search.cost import COSTS
from nipq_search.errors import UserError
from nipq_search.quant import QUANTIZERS
from nipq_search.quant.config import ActivationStart, Granularity, Proxy, Start
from nipq_search.records import TrialRecord
from nipq_search.search import jobs
from nipq_search.search.config.resume import check_resume
from nipq_search.search.config.space import FORMS, distribution
from nipq_search.search.config.sweep_config import (
    SweepConfig,
    load_config,
    parse_config,
)
from nipq_search.search.coordinator.coordinator import Verdict
from nipq_search.search.jobs import lease
from nipq_search.search.results import sweep
from nipq_search.search.run import run_sweep
from nipq_search.search.strategies.samplers import SAMPLERS
from nipq_search.search.strategies.strategies import STRATEGIES
from nipq_search.search.study import ledger, storage
from nipq_search.search.worker.worker import execute
from nipq_search.tasks import TASKS
from nipq_search.tasks.vision.fashion_mnist import VARIABLE
from nipq_search.train import HYPERPARAMETERS
from nipq_search.train.config import BitStart

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"

sys.path.insert(0, str(DOCS))
import draw_architecture  # noqa: E402


def markdown_files() -> list[Path]:
    """Return every page of the project, outside environments and sweeps."""
    folders = [
        path
        for path in ROOT.iterdir()
        if path.is_dir()
        and not path.name.startswith(".")
        and path.name != "runs"
        and not (path / "pyvenv.cfg").exists()
    ]
    found = [*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))]
    return sorted(found)


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def sections(page: Path) -> dict[str, str]:
    """Return the text below each heading, keyed by the heading without backticks."""
    parts = re.split(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {
        title.replace("`", ""): text for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def rows(text: str, first: str) -> dict[str, list[str]]:
    """Return the rows of tables whose first column is named `first`, keyed by that column."""
    found: dict[str, list[str]] = {}
    wanted = False
    for line in text.splitlines():
        if not line.startswith("|"):
            wanted = False
            continue
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if wanted and not set(cells[0]) <= set("-:"):
            name = cells[0].strip("`")
            assert name not in found, f"{name} is listed twice"
            found[name] = cells[1:]
        wanted = wanted or cells[0] == first
    return found


# Settings


def settings(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the default of every setting by dotted key; `...` marks a section."""
    if isinstance(section, pydantic.BaseModel):
        fields = {
            (f.alias or n): getattr(section, n) for n, f in type(section).model_fields.items()
        }
    else:
        fields = {
            f.name.rstrip("_"): getattr(section, f.name) for f in dataclasses.fields(section)
        }
    found = {}
    for name, value in fields.items():
        if isinstance(value, pydantic.BaseModel) or dataclasses.is_dataclass(value):
            found |= {f"{prefix}{name}": ..., **settings(value, f"{prefix}{name}.")}
        else:
            found[f"{prefix}{name}"] = value
    return found


def test_every_setting_is_documented_with_its_default():
    table = rows((DOCS / "sweep-file.md").read_text(), "key")
    config = SweepConfig(name="x", task="x", budgets=[{"bops": "uniform 4"}])
    defaults = settings(config)
    assert table.keys() == defaults.keys()
    needed = {n for n, f in SweepConfig.model_fields.items() if f.is_required()}
    for key, default in defaults.items():
        kind, shown, meaning = table[key]
        assert kind and meaning
        if default is ...:
            assert (kind, shown) == ("section", ""), key
        elif key in needed:
            assert shown == "required", key
        else:
            value = json.loads(json.dumps(default))
            assert value == yaml_value(shown.strip("`")), f"{key} is {default!r}, not {shown}"


def yaml_value(text: str) -> Any:
    """Parse a value as a sweep file does; plain YAML reads `1e-4` as a string."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def test_every_name_that_a_sweep_file_can_use_is_documented():
    page = (DOCS / "sweep-file.md").read_text()
    parts = sections(DOCS / "sweep-file.md")
    shown = rows(parts["Search space"], "hyperparameter")
    assert shown.keys() == HYPERPARAMETERS.keys()
    for name, field in HYPERPARAMETERS.items():
        assert f"`train.{field.rstrip('_')}`" in shown[name][0]
    forms = rows(parts["Search space"], "form")
    assert set(forms) == set(FORMS)
    for form, (example, _) in forms.items():
        ((name, space),) = yaml.safe_load(example.strip("`")).items()
        assert form in space
        distribution(name, space)
    assert rows(parts["Budgets"], "cost").keys() == COSTS.keys()
    assert rows(page, "task").keys() == TASKS.keys()
    table = rows(page, "key")
    for key, names in (
        ("search.strategy", STRATEGIES),
        ("train.start", BitStart),
        ("search.sampler", SAMPLERS),
        ("quant.quantizer", QUANTIZERS),
        ("quant.proxy", Proxy),
        ("quant.weights.granularity", Granularity),
        ("quant.weights.start", Start),
        ("quant.activations.start", ActivationStart),
    ):
        assert set(re.findall(r"`(\w+)`", table[key][0])) == {str(name) for name in names}, key
    assert set(rows(page, "variable")) == {
        "NIPQ_STORAGE_URL",
        "NIPQ_STORAGE_URL_FILE",
        "MLFLOW_TRACKING_URI_FILE",
        "MLFLOW_TRACKING_URI",
        VARIABLE,
        DEBUG,
    }


# Commands


def test_every_command_and_option_is_documented():
    parts = sections(DOCS / "commands.md")
    commands = typer.main.get_command(app).commands
    overview = rows(parts["Commands"], "command")
    assert [re.match(r"\[`(\w+)", name)[1] for name in overview] == list(commands)
    for name, command in commands.items():
        (usage,) = re.findall(r"^nipq-search .*$", parts[name], re.M)
        assert usage.split()[1] == name
        options = {o.opts[0] for o in command.params if o.param_type_name == "option"}
        assert {option.split()[0] for option in rows(parts[name], "option")} == options, name
        assert set(re.findall(r"--[\w-]+", usage)) == options, name
        for argument in (p.metavar for p in command.params if p.param_type_name == "argument"):
            assert argument in usage, name
    assert set(rows(parts["Exit codes"], "code")) == {"0", "1", "2", "3", "4", "130"}


# Links and snippets


def slug(heading: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", markdown_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link or link.startswith("mailto:"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in {slug(heading) for heading in sections(target)}, f"{link}: no anchor"


PATHS = [page for page in markdown_files() if page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", PATHS, ids=lambda p: str(p.relative_to(ROOT)))
def test_source_files_named_in_the_documentation_exist(page):
    for name in re.findall(r"`([\w/-]+/[\w-]+\.py)`", page.read_text()):
        places = (ROOT, ROOT / "nipq_search", page.parent)
        assert any((place / name).is_file() for place in places), f"{name}: no such file"


def test_the_picture_of_the_architecture_is_current():
    assert draw_architecture.main(["--check"]) == 0, "run python docs/draw_architecture.py"


def test_an_outdated_picture_is_found(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "architecture.svg"
    picture.write_text(draw_architecture.draw().replace("cost/", "costs/"))
    monkeypatch.setattr(draw_architecture, "PICTURE", picture)
    assert draw_architecture.main(["--check"]) == 1
    assert "draw_architecture.py" in capsys.readouterr().err
    assert draw_architecture.main([]) == draw_architecture.main(["--check"]) == 0


PYTHON = [block for block in blocks(README, "python") if "class TwoMoons" not in block]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_in_the_readme_runs(number, capsys):
    exec(compile(PYTHON[number], "README.md", "exec"), {"__name__": "snippet"})
    assert capsys.readouterr().out


YAML = [
    (page, text)
    for page in [*markdown_files(), *sorted((ROOT / "pipelines").glob("*.yaml"))]
    for text in ([page.read_text()] if page.suffix == ".yaml" else blocks(page, "yaml"))
]


@pytest.mark.parametrize(("page", "text"), YAML, ids=[page.name for page, _ in YAML])
def test_sweep_files_are_accepted(page, text, tmp_path):
    (tmp_path / "sweep.yaml").write_text(text)
    load_config(tmp_path / "sweep.yaml")


# A sweep


class InProcess:
    """Executor that runs jobs sequentially in this process."""

    def run(self, coordinator: Any, task: Any, tick: Any) -> None:
        while not isinstance(job := coordinator.next_job(), Verdict):
            execute(job, task, lambda report: None)
            coordinator.finished(job)
            tick()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the folder of a finished sweep with the task and sweep file of the README."""
    place = tmp_path_factory.mktemp("readme")
    (task,) = [block for block in blocks(README, "python") if "class TwoMoons" in block]
    (text,) = blocks(README, "yaml")
    (place / "my_task.py").write_text(task)
    (place / "my_sweep.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("NIPQ_STORAGE_URL", "NIPQ_STORAGE_URL_FILE", "MLFLOW_TRACKING_URI"):
            patch.delenv(variable, raising=False)
        patch.syspath_prepend(place)
        patch.setattr("nipq_search.search.run.ray_cluster", lambda *args: contextlib.nullcontext())
        # MLflow takes seconds to start and has its own tests.
        patch.setattr("nipq_search.search.results.outputs.MlflowRecorder", Mock())
        shorter = ["search.trials=2", "train.epochs=2", "float.epochs=3"]
        config = load_config(place / "my_sweep.yaml", shorter)
        outcome = run_sweep(config, place / "sweep", executor=InProcess())
        assert (outcome.state, outcome.complete, outcome.failed) == ("finished", 2, 0)
        yield place / "sweep"
    sys.modules.pop("my_task", None)


def test_the_readme_s_sweep_keeps_its_budgets(finished):
    records = sweep.Sweep.open(finished).trials()
    assert all(isinstance(r, TrialRecord) and r.state == "COMPLETE" for r in records)
    for record in records:
        assert max(record.cost[name] / target for name, target in record.budget.items()) <= 1
    assert {len(record.budget) for record in records} == {1, 2}


def test_a_folder_belongs_to_one_sweep(finished):
    config = load_config(finished.parent / "my_sweep.yaml", ["name=another"])
    with pytest.raises(UserError, match="contains the sweep 'two-moons', not 'another'"):
        run_sweep(config, finished, executor=InProcess())


def test_a_new_study_does_not_adopt_the_trials_of_another(finished, tmp_path):
    shutil.copytree(finished / "trials", tmp_path / "sweep" / "trials")
    shutil.copy(finished / "sweep.yaml", tmp_path / "sweep")
    shutil.copy(finished / "facts.json", tmp_path / "sweep")
    config = load_config(finished.parent / "my_sweep.yaml")
    with pytest.raises(UserError, match="the study 'two-moons' with its trials is gone"):
        run_sweep(config, tmp_path / "sweep", executor=InProcess())


def test_a_budget_of_another_cost_may_come_first_if_the_front_s_cost_is_named():
    (text,) = blocks(README, "yaml")
    document = yaml.safe_load(text)
    old = parse_config(document).as_json()
    document["budgets"].insert(0, {"weight_bytes": "uniform 4"})
    with pytest.raises(UserError, match="set search.front_cost"):
        check_resume(old, parse_config(document))
    document["search"]["front_cost"] = "bops"
    check_resume(old, parse_config(document))


OPEN = {"budget", "limits", "params", "reachable", "targets", "metric"}
"""Mappings with sweep-dependent keys, and `metric`, which is a mapping or a number."""


def shape(value: Any) -> Any:
    """Return the nested keys of a document; for a list, those of its first entry."""
    if isinstance(value, dict):
        return {key: None if key in OPEN else shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return None


@pytest.mark.parametrize(
    "command", ["plan", "status", "front", "show", "logs", "best", "doctor", "replay", "gc"]
)
def test_json_documents_are_as_documented(command, finished, capsys):
    (text,) = re.findall(r"```json\n(.*?)```", sections(DOCS / "commands.md")[command], re.S)
    (finished / "trials/0/attempt-1/log.txt").write_text("something\n")
    left = finished / "trials/0/checkpoints"  # the state after a kill
    left.mkdir()
    arguments = {
        "plan": [str(ROOT / "pipelines" / "digits.yaml")],
        "show": [str(finished), "0"],
        "logs": [str(finished), "0"],
        "best": [str(finished), "--max", "bops=1"],
        "replay": [str(finished), "0"],
        "gc": [str(finished), "--dry-run"],
        "doctor": [],
    }.get(command, [str(finished)])
    capsys.readouterr()
    main([command, *arguments, "--json"])
    left.rmdir()
    document = json.loads(capsys.readouterr().out)
    assert shape(json.loads(text)) == shape(document)
    assert list(json.loads(text)) == list(document)


def test_every_file_of_a_sweep_is_documented(finished):
    text = (DOCS / "files.md").read_text()
    for path in finished.rglob("*"):
        name = re.sub(r"^attempt-\d+$", "attempt-<k>", path.name)
        name = re.sub(r"^lsq-\d+$", "lsq-<bits>", re.sub(r"^\d+$", "<n>", name))
        assert re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text), f"{path}: not documented"
    more = {jobs.STOPPED, jobs.TRACEBACK, jobs.HANG, jobs.PROGRESS, storage.JOURNAL}
    more |= {storage.DATABASE, lease.LOCK_FILE, lease.STOP_FILE, "checkpoints/"}
    more |= {"mlflow.db", "mlartifacts/"}
    assert [name for name in more if name not in text] == []


@pytest.mark.parametrize("table", ["results.parquet", "curves.parquet"])
def test_columns_are_documented(table, finished):
    text = (DOCS / "files.md").read_text().partition(f"`{table}`:\n")[2].partition("\n\n`")[0]
    text = text.partition("\n## ")[0]
    documented = rows(text, "column")
    columns = list(pd.read_parquet(finished / table).columns)
    prefixes = tuple(name.partition("<")[0] for name in documented if "<" in name)
    assert [c for c in columns if c not in documented and not c.startswith(prefixes)] == []
    assert [c for c in documented if "<" not in c and c not in columns] == []
    assert all(any(c.startswith(prefix) for c in columns) for prefix in prefixes)


def test_the_enqueued_trial_is_taken_next(tmp_path, monkeypatch):
    (snippet,) = blocks(DOCS / "files.md", "python")
    folder = tmp_path / "runs" / "digits"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NIPQ_STORAGE_URL", raising=False)
    monkeypatch.delenv("NIPQ_STORAGE_URL_FILE", raising=False)
    space = {
        "lr": distribution("lr", {"log": [0.01, 0.1]}),
        "lambda": distribution("lambda", {"log": [1, 100]}),
        "warmup": distribution("warmup", {"uniform": [0.0, 0.2]}),
    }
    book = ledger.Ledger.open(folder, "digits", "max", space=space, sampler="random", seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(snippet, "files.md", "exec"), {})
    asked = book.ask(1, 2)
    assert asked.budget == 0
    assert (asked.params["lr"], asked.params["lambda"]) == (0.03, 10.0)
    assert 0 <= asked.params["warmup"] <= 0.2
