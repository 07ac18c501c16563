"""End-to-end runs of the recipes in `pipelines/paper` on tiny data sets.

The data sets have the same format as the real ones. Only paths, sizes, weights and lengths are
changed, as with `--set` on the command line. The sweeps run in this process, without Ray and
MLflow.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
import yaml
from tiny_images import image_tree
from tiny_language import reviews, write_checkpoint

from nipq_search.records import TrialRecord
from nipq_search.search.config.sweep_config import load_config
from nipq_search.search.coordinator.coordinator import Verdict
from nipq_search.search.results.sweep import Sweep
from nipq_search.search.run import run_sweep
from nipq_search.search.worker.worker import execute

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "pipelines" / "paper").glob("*.yaml"))
LITE0 = ROOT / "pipelines" / "efficientnet_lite0_fashion.yaml"
SHORT = ["train.epochs=1", "train.batch_size=8", "train.norm_batches=1", "search.baselines=[]"]
# Untrained models diverge with the learning rate of the paper.
SHORT += ["train.lr=0.001", "resources.cpus=1", "resources.gpus=0"]


class InProcess:
    """An executor that runs the jobs of a sweep sequentially in this process."""

    def run(self, coordinator, task, tick):
        while not isinstance(job := coordinator.next_job(), Verdict):
            execute(job, task, lambda report: None)
            coordinator.finished(job)
            tick()


@pytest.fixture
def sweep_of(tmp_path, monkeypatch):
    """A function that runs a sweep file with changed values and returns the finished sweep."""
    for variable in ("NIPQ_STORAGE_URL", "NIPQ_STORAGE_URL_FILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(
        "nipq_search.search.run.ray_cluster", lambda *args: contextlib.nullcontext()
    )
    monkeypatch.setattr("nipq_search.search.results.outputs.MlflowRecorder", Mock())

    def run(file, changes):
        config = load_config(file, [*SHORT, *changes])
        outcome = run_sweep(config, tmp_path / "sweep", executor=InProcess())
        assert (outcome.state, outcome.failed) == ("finished", 0)
        assert outcome.complete == config.search.trials
        return Sweep.open(tmp_path / "sweep")

    return run


def image_changes(file, folder):
    """Return `--set` values that shrink the data, weights, sizes and budgets of a recipe."""
    document = yaml.safe_load(file.read_text())
    name = document["task_args"]["model"]
    model = timm.create_model(name, num_classes=3).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the average of all batches
    for _ in range(2):  # activations vanish without normalization statistics
        model(torch.randn(8, 3, 32, 32))
    torch.save(model.state_dict(), folder / "float.pt")
    tree = image_tree(folder / "imagenet", {"train": 14, "val": 3}, classes=3, size=40)
    changes = [f"task_args.path={tree}", f"float.checkpoint={folder / 'float.pt'}"]
    changes += ["task_args.size=32", "task_args.workers=1", "task_args.validation=0.2"]
    changes.append("search.trials=1")
    if "teacher" in document["task_args"]:
        changes += ["task_args.teacher=test_efficientnet", "task_args.teacher_weights=null"]
    for index, budget in enumerate(document["budgets"]):
        if isinstance(budget.get("bops"), float):
            changes.append(f"budgets.{index}.bops=uniform 4")
    return changes


def text_changes(folder):
    """Return `--set` values that shrink the GLUE recipe."""
    for name, rows in (("train", reviews(60)), ("dev", reviews(20, seed=1))):
        lines = [f"{row['review']}\t{int(row['verdict'] == 'good')}" for row in rows]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    changes = [f"task_args.path={folder / 'train.tsv'}", f"task_args.test={folder / 'dev.tsv'}"]
    changes += [f"task_args.model={write_checkpoint(folder / 'bert')}", "task_args.max_length=24"]
    return [*changes, "search.trials=2", "float.epochs=1"]


@pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])
def test_a_recipe_runs_to_its_end(file, sweep_of, tmp_path):
    changes = text_changes(tmp_path) if "glue" in file.name else image_changes(file, tmp_path)
    sweep = sweep_of(file, changes)
    for record in sweep.trials():
        assert isinstance(record, TrialRecord) and record.state == "COMPLETE"
        assert all(record.cost[name] <= target for name, target in record.budget.items())
    assert len(sweep.front()) >= 1


def test_lite0_on_fashion_mnist_runs_to_its_end(sweep_of):
    small = ["train_samples=16", "validation_samples=10", "test_samples=10", "size=32"]
    changes = [f"task_args.{change}" for change in small]
    changes += ["float.epochs=1", "float.batch_size=8", "search.trials=1"]
    assert len(sweep_of(LITE0, changes).trials()) == 1


@pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])
def test_a_recipe_says_what_to_type_and_how_long_it_takes(file):
    header = file.read_text().partition("\nname:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"nipq-search run pipelines/paper/{file.name} " in header
    assert "ASSUMPTION" in header and re.search(r"\d+ hours", header)
    page = (ROOT / "docs" / "paper-recipes.md").read_text()
    assert f"`{file.name}`" in page


@pytest.mark.parametrize(
    "file", [f for f in RECIPES if "imagenet" in f.name], ids=lambda f: f.stem
)
def test_the_paper_s_figures_are_kept(file):
    config = load_config(file, [])
    train = config.train
    assert (train.epochs, train.batch_size, train.lr, train.weight_decay) == (43, 256, 0.04, 1e-5)
    assert train.momentum == 0.9 and train.optimizer == "sgd"
    assert train.noise_share * 43 == pytest.approx(40, abs=1e-4)
    assert train.warmup * 43 == pytest.approx(3, abs=1e-4)
    assert train.lambda_ * 1 / 5.3 == pytest.approx(3, abs=1e-3)
    assert train.distill and train.distill_weight == 0.5
    assert list(config.quant.weights.bits) == list(config.quant.activations.bits)
    assert list(config.quant.weights.bits) == list(range(2, 15))
