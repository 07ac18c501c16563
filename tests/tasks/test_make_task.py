"""Construction of tasks by name: the registry, user-defined classes, and error messages."""

from __future__ import annotations

import sys

import pytest
import torch

from nipq_search.errors import UserError
from nipq_search.tasks import TASKS, base, check_task, make_task
from nipq_search.tasks.vision.digits import Digits

OWN = """
import torch
from torch import nn

class Regression:
    metric = ("error", "min")

    def __init__(self, scale, noise=0.0):
        self.scale = scale
        if noise < 0:
            raise ValueError("noise is negative")

    def build_model(self):
        return nn.Linear(2, 1)

    def example_inputs(self):
        return (torch.zeros(1, 2),)

    def loader(self, split, batch_size, seed):
        yield {"x": torch.ones(batch_size, 2), "y": self.scale * torch.ones(batch_size, 1)}

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch["x"]), batch["y"])

    def evaluate(self, model, split):
        return {"error": 0.0}

class Half:
    metric = ("accuracy", "max")

    def build_model(self):
        return None
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module that defines tasks."""
    (tmp_path / "own_task_module.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_task_")]:
        del sys.modules[name]


@pytest.mark.parametrize("task", ["digits", "fashion_mnist"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split_seed": -1}, "task_args.split_seed: -1 is not an integer from 0 to"),
        ({"split_seed": 1e30}, r"task_args.split_seed: 1e\+30 is not an integer"),
        ({"width": 0}, "task_args.width: 0 is not a positive integer"),
        ({"width": "a"}, "task_args.width: 'a' is not a positive integer"),
        ({"blocks": [-1]}, "task_args.blocks: -1 is not a positive integer"),
        ({"blocks": []}, "task_args.blocks: .* is not a list of positive integers"),
    ],
)
def test_invalid_arguments_are_named(task, arguments, message):
    with pytest.raises(UserError, match=message):
        make_task(task, arguments)


def test_own_class_from_the_current_directory(here):
    before = list(sys.path)
    task = make_task("own_task_module:Regression", {"scale": 2.0})
    assert task.scale == 2.0
    assert sys.path == [*before, str(here)]


def test_optional_members_have_defaults(here):
    task = make_task("own_task_module:Regression", {"scale": 2.0})
    batch = next(iter(task.loader("train", 5, 0)))
    base.load_data(task)
    assert base.num_samples(task, batch) == 5
    assert base.input_bits(task) is None
    assert base.dataset(task) == {"name": "Regression", "splits": {}, "digest": None}
    assert base.to_device(task, batch, "meta")["x"].device.type == "meta"
    assert not base.has_distillation(task)
    with pytest.raises(UserError, match="set train.distill to false"):
        base.distill_loss(task, torch.nn.Identity(), torch.nn.Identity(), batch)


def test_batch_without_tensors_needs_a_count():
    with pytest.raises(UserError, match="needs num_samples"):
        base.num_samples(object(), ["text"])


@pytest.mark.parametrize(
    ("name", "args", "problem"),
    [
        ("digit", {}, r"task: unknown task 'digit' \(did you mean 'digits'\?\)"),
        ("digits", {"widht": 8}, r"task_args.widht: .* \(did you mean 'width'\?\)"),
        ("own_task_module:Regression", {}, "task_args.scale: .* needs this argument"),
        ("own_task_module:Regression", {"scale": 1, "noise": -1}, "noise is negative"),
        ("own_task_module:Regresion", {}, r"no class 'Regresion' \(did you mean 'Regression'\?\)"),
        ("own_task_module:Half", {}, r"task Half lacks example_inputs\(\), loader\(\), loss"),
        ("own_task_absent:Task", {}, "no module named 'own_task_absent', neither installed nor"),
        ("own_task_broken:Task", {}, "importing own_task_broken failed with ModuleNotFoundError"),
        ("own_task_raises:Task", {}, "importing own_task_raises failed with ZeroDivisionError"),
        ("own_task_exits:Task", {}, "importing own_task_exits failed with SystemExit"),
        ("../evil:Task", {}, "is not of the form package.module:Class"),
        ("module:", {}, "is not of the form package.module:Class"),
    ],
)
def test_errors_are_reported_in_one_line(here, name, args, problem):
    (here / "own_task_broken.py").write_text("import no_such_package_here\n")
    (here / "own_task_raises.py").write_text("1 / 0\n")
    (here / "own_task_exits.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(UserError, match=problem) as error:
        make_task(name, args)
    assert "\n" not in str(error.value)


def test_metric_is_checked():
    class Task(Digits):
        metric = ("accuracy", "highest")

    with pytest.raises(UserError, match="needs metric"):
        check_task(Task())


def test_a_registered_name_builds_its_task():
    with TASKS.temporarily("another", Digits):
        assert isinstance(make_task("another"), Digits)


def test_missing_scikit_learn_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'nipq-search\[digits\]'"):
        Digits().load_data()
