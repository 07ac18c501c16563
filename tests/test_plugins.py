"""Plug-ins from end to end: an installed example package, and packages that break or clash."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from fake_packages import install

from nipq_search import file_io, testing
from nipq_search.errors import UserError
from nipq_search.search.backend.nodes import _plugin_problem
from nipq_search.search.backend.virtual import VirtualExecutor
from nipq_search.search.checks.doctor import doctor
from nipq_search.search.checks.doctor_nodes import differences, inspect_node
from nipq_search.search.commands.replay import replay
from nipq_search.search.config.plugins import (
    FAMILIES,
    check_installed,
    plugin_changes,
    plugin_mismatches,
)
from nipq_search.search.config.sweep_config import load_config, parse_config
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.run import run_sweep

ROOT = Path(__file__).parents[1]
EXAMPLE = Path(__file__).parent / "example_plugin"
PLUGINS = {
    "quantizer.clip": "nipq-example 1.2.0",
    "cost.traffic_bytes": "nipq-example 1.2.0",
    "task.rings": "nipq-example 1.2.0",
    "strategy.round_robin": "nipq-example 1.2.0",
    "sampler.parzen": "nipq-example 1.2.0",
}
SWEEP = {
    "name": "plugged",
    "task": "rings",
    "float": {"epochs": 1, "batch_size": 64},
    "quant": {"quantizer": "clip"},
    "budgets": [{"bops": "uniform 4", "traffic_bytes": "uniform 4"}, {"bops": "uniform 3"}],
    "train": {"epochs": 1, "batch_size": 64, "distill": False, "calibration_batches": 1},
    "search": {
        "strategy": "round_robin",
        "sampler": "parzen",
        "trials": 2,
        "baselines": [],
        "space": {"lr": {"log": [0.01, 0.1]}},
    },
}


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A folder into which pip has installed the example package, without network access."""
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(EXAMPLE, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-index", "--no-build-isolation", "--no-deps", "--target", folder / "site"]
    subprocess.run([*pip, *offline, source], check=True, cwd=folder)
    return folder / "site"


def forget() -> None:
    """Unload the plug-ins of this process."""
    for registry in FAMILIES.values():
        registry._loaded.clear()
    for name in [n for n in sys.modules if n.partition(".")[0] in ("nipq_example", "fake_plugin")]:
        del sys.modules[name]


@pytest.fixture
def path(monkeypatch):
    """Extend the import path of this process for one test."""
    forget()
    yield lambda folder: monkeypatch.syspath_prepend(str(folder))
    forget()


def python(code: str, *places: Path, **options) -> subprocess.CompletedProcess[str]:
    """Run code in a new process with additional folders on its import path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*places, ROOT]))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


LISTED = """
import sys
import nipq_search
from nipq_search.search.config.plugins import FAMILIES, installed_plugins
from nipq_search.search.config.sweep_config import parse_config

print({entry: str(plugin) for entry, plugin in installed_plugins()})
for entry, _ in installed_plugins():
    family, _, name = entry.partition(".")
    assert name in FAMILIES[family] and name in FAMILIES[family].names()
assert not [name for name in sys.modules if name.startswith(("nipq_example", "pytest"))]
print(FAMILIES["quantizer"]["clip"])
loaded = sorted(name for name in sys.modules if name.startswith("nipq_example"))
assert loaded == ["nipq_example", "nipq_example.quantizer"], loaded
"""


def test_the_guide_names_every_family_and_suite():
    page = (ROOT / "docs" / "extending.md").read_text()
    groups = set(re.findall(r"^\| `(nipq_search\.\w+)` \|", page, re.M))
    assert groups == {registry.group for registry in FAMILIES.values()}
    shown = set(re.findall(r"^\| `(\w+Conformance)` \| `(\w+)` \|", page, re.M))
    assert {name for name, _ in shown} == set(testing.__all__) - {"suites"}
    assert {attribute for _, attribute in shown} == set(FAMILIES)
    (toml,) = re.findall(r"^```toml\n(.*?)^```$", page, re.M | re.S)
    example = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]
    for group, entries in tomllib.loads(toml)["project"]["entry-points"].items():
        assert entries.keys() == example[group].keys()


def test_an_installed_package_is_found_and_imported_when_it_is_looked_up(site):
    done = python(LISTED, site)
    assert done.returncode == 0, done.stderr
    listed, looked_up = done.stdout.splitlines()
    assert eval(listed) == PLUGINS
    assert looked_up == "<class 'nipq_example.quantizer.Clip'>"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_subclass_runs_a_family_s_whole_suite(site, tmp_path):
    shutil.copy(EXAMPLE / "conformance.py", tmp_path)
    arguments = ["-q", "-W", "error", "-p", "no:cacheprovider", "conformance.py"]
    done = python(f"import pytest; raise SystemExit(pytest.main({arguments}))", site, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "failed" not in done.stdout


BROKEN_SUITE = """
from nipq_search.quant.quantizers.lsq import LSQ
from nipq_search.testing import QuantizerConformance

class Deaf(LSQ):
    def alpha(self, elements_per_boundary=1.0):
        return super().alpha(elements_per_boundary).detach()

class TestDeaf(QuantizerConformance):
    quantizer = Deaf
"""


def test_the_suite_finds_a_fault(tmp_path):
    (tmp_path / "broken_suite.py").write_text(BROKEN_SUITE)
    arguments = ["-q", "-p", "no:cacheprovider", "-k", "learns", "broken_suite.py"]
    code = f"import pytest; raise SystemExit(pytest.main({arguments}))"
    done = python(code, cwd=tmp_path)
    assert done.returncode == 1
    assert "test_every_parameter_learns" in done.stdout and "assert (" in done.stdout


@pytest.fixture
def swept(site, path, tmp_path):
    """Folder of a sweep in which every family's entry comes from the example package."""
    path(site)
    run_sweep(parse_config(SWEEP), tmp_path / "sweep", executor=VirtualExecutor())
    return tmp_path / "sweep"


def test_a_sweep_of_plugins_alone(swept, site, path, tmp_path, caplog, monkeypatch):
    document = yaml.safe_load((swept / "sweep.yaml").read_text())
    assert document["plugins"] == PLUGINS
    for record in swept.rglob("attempt-*/result.json"):
        assert file_io.read_sealed(record)["provenance"]["plugins"] == PLUGINS
    sweep = Sweep.open(swept)
    assert [t.state for t in sweep.trials()] == ["COMPLETE", "COMPLETE"]
    point = sweep.front_document()["points"][0]
    targets = sweep.facts["budgets"][0]["targets"]
    assert point["cost"]["traffic_bytes"] <= targets["traffic_bytes"]
    assert sweep.best({"traffic_bytes": 1e9})["point"] is not None
    assert replay(sweep, 0)["equal"] and replay(sweep, 0)["exact"]

    # The written configuration is a sweep file; resuming with a different version is reported.
    newer = tmp_path / "newer"
    shutil.copytree(site, newer)
    (info,) = newer.glob("*.dist-info")
    metadata = (info / "METADATA").read_text().replace("Version: 1.2.0", "Version: 1.3.0")
    (info / "METADATA").write_text(metadata)
    path(newer)
    config = load_config(swept / "sweep.yaml")
    with caplog.at_level(logging.WARNING, "nipq_search"):
        run_sweep(config, swept, trials=3, executor=VirtualExecutor())
    changes = [message for message in caplog.messages if "plug-ins have changed" in message]
    assert len(changes) == 1
    assert "nipq-example 1.2.0 -> nipq-example 1.3.0 (cost 'traffic_bytes', qu" in changes[0]
    document = yaml.safe_load((swept / "sweep.yaml").read_text())
    assert set(document["plugins"].values()) == {"nipq-example 1.3.0"}
    lines = []
    found = replay(Sweep.open(swept), 0, lines.append)
    assert found["equal"] and not found["exact"]
    assert "quantizer.clip nipq-example 1.2.0, here nipq-example 1.3.0" in lines[0]

    # Without the package, the error message names it.
    forget()
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in (str(site), str(newer))])
    missing = "quantizer 'clip' comes from nipq-example 1.3.0, which is not installed; run python"
    with pytest.raises(UserError, match=missing):
        Sweep.open(swept)
    with pytest.raises(UserError, match=missing) as caught:
        load_config(swept / "sweep.yaml")
    assert str(caught.value).endswith("python -m pip install nipq-example==1.3.0")
    with pytest.raises(UserError, match="unknown quantizer 'clip'"):
        parse_config(SWEEP)


def test_a_sweep_without_plugins_names_none():
    config = parse_config({"name": "x", "task": "digits", "budgets": [{"bops": "uniform 4"}]})
    assert config.with_plugins() == config
    assert "plugins" not in config.as_json()
    own = parse_config({**config.as_json(), "task": "my.module:Task"})
    assert [entry for entry in own.entries if entry.startswith("task")] == []


def test_every_node_needs_the_same_versions(site, path, tmp_path):
    wanted = {"quantizer.clip": "nipq-example 1.2.0"}
    lacking = (
        "quantizer 'clip' needs nipq-example 1.2.0, found none: "
        "python -m pip install nipq-example==1.2.0"
    )
    assert plugin_mismatches(wanted) == [lacking] and _plugin_problem(wanted) == lacking
    (tmp_path / "token").write_text("token")
    node = inspect_node(str(tmp_path), "token", None, {}, None, wanted)
    assert differences(node, {**node, "plugins": []}, str(tmp_path)) == [lacking]
    path(site)
    assert plugin_mismatches(wanted) == [] and _plugin_problem(wanted) is None
    (other,) = plugin_mismatches({"quantizer.clip": "nipq-example 1.1.0"})
    assert "needs nipq-example 1.1.0, found nipq-example 1.2.0" in other
    (own,) = plugin_mismatches({"quantizer.nipq": "nipq-example 1.2.0"})
    assert "found nipq_search" in own


def test_changes_and_missing_packages_are_one_line_each():
    before = {"cost.x": "a 1", "cost.y": "b 1", "cost.z": "c 1"}
    assert plugin_changes(before, {"cost.x": "a 2", "cost.y": "b 1"}) == ["a 1 -> a 2 (cost 'x')"]
    check_installed({"cost.bops": "a 1", "format.unknown": "b 1", 3: None})
    with pytest.raises(UserError, match="plugins: cost 'x' comes from a 1, which is not inst"):
        check_installed(before)


def plugins_check():
    (found,) = (check for check in doctor() if check["check"] == "plug-ins")
    return found


def test_doctor_lists_plugins_and_names_clashes(site, path, tmp_path):
    path(site)
    found = plugins_check()
    assert found["ok"] and "quantizer.clip (nipq-example 1.2.0)" in found["detail"]
    assert "nipq_example" not in sys.modules
    point = {"nipq_search.quantizers": {"nipq": "fake_plugin:NIPQ", "clip": "fake_plugin:Clip"}}
    install(tmp_path / "other", "other-package", "3", points=point)
    path(tmp_path / "other")
    found = plugins_check()
    assert not found["ok"]
    assert "quantizer 'nipq' of other-package 3 is ignored: nipq_search has its" in found["fix"]
    assert "quantizer 'clip' is provided by" in found["fix"]
    with pytest.raises(UserError, match="quantizer 'clip' is provided by .*; uninstall all but"):
        parse_config(SWEEP)


def test_a_broken_plugin_is_named_by_the_sweep_that_uses_it(path, tmp_path):
    points = {"nipq_search.strategies": {"broken": "fake_plugin:Strategy"}}
    install(tmp_path, "broken-package", points=points, modules={"fake_plugin": "1 / 0\n"})
    path(tmp_path)
    document = {"name": "x", "task": "digits", "budgets": [{"bops": "uniform 4"}]}
    parse_config(document)
    assert plugins_check()["ok"]
    with pytest.raises(UserError) as caught:
        parse_config({**document, "search": {"strategy": "broken"}})
    message = str(caught.value)
    assert message.startswith("sweep: search.strategy: strategy 'broken' of broken-package 1.0")
    assert "cannot be loaded (ZeroDivisionError: division by zero)" in message
    assert message.endswith("update or uninstall broken-package") and "\n" not in message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"quant": {"quantizer": "no_such"}}, "quant.quantizer: unknown quantizer 'no_such'"),
        ({"budgets": [{"no_such": 3}]}, "budgets: unknown cost 'no_such'"),
        ({"search": {"sampler": "tpf"}}, r"search.sampler: unknown sampler 'tpf' \(did you mean"),
    ],
)
def test_unknown_names_keep_their_line(change, key):
    document = {"name": "x", "task": "digits", "budgets": [{"bops": "uniform 4"}], **change}
    with pytest.raises(UserError, match=f"^sweep: {key}"):
        parse_config(document)
