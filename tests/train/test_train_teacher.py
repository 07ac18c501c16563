"""The teacher for distillation: the float model, or the task's own teacher."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train_tasks import CPU, Regression, SpiedDigits, digits_spec, interrupted, mlp_spec, outcome

from nipq_search.errors import UserError
from nipq_search.tasks.base import build_teacher
from nipq_search.tasks.vision.digits import Digits
from nipq_search.train import FloatConfig, TrainSpec, train
from nipq_search.train.models import load_float


class Taught(SpiedDigits):
    """A task with a wider teacher; counts how often it is built and records which one is used."""

    def __init__(self, answer="wide"):
        super().__init__()
        self.answer, self.built, self.teachers = answer, 0, []

    def build_teacher(self):
        self.built += 1
        torch.rand(1)  # a draw that must not affect anything else
        return Digits(width=6).build_model() if self.answer == "wide" else self.answer

    def distill_loss(self, model, teacher, batch):
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        self.teachers.append(teacher)
        return super().distill_loss(model, teacher, batch)


def width(model):
    return next(model.parameters()).shape[0]


def test_the_tasks_own_teacher_is_used(float_model, tmp_path):
    task = Taught()
    result = train(task, digits_spec(float_model, epochs=0.5), tmp_path, CPU)
    assert task.built == 1
    assert {width(teacher) for teacher in task.teachers} == {6}
    assert len({id(teacher) for teacher in task.teachers}) == 1
    usual = train(SpiedDigits(), digits_spec(float_model, epochs=0.5), tmp_path / "usual", CPU)
    assert result.model_sha256 != usual.model_sha256


def test_without_a_teacher_the_float_model_is_used(float_model, tmp_path):
    task, spec = Taught(answer=None), digits_spec(float_model, epochs=0.5)
    result = train(task, spec, tmp_path / "taught", CPU)
    assert {width(teacher) for teacher in task.teachers} == {4}
    expected = load_float(task, float_model, 1, CPU).state_dict()
    found = task.teachers[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert outcome(result) == outcome(train(SpiedDigits(), spec, tmp_path / "usual", CPU))


def test_the_teacher_is_built_only_for_distillation(float_model, tmp_path):
    task = Taught(answer=0)
    for index, options in enumerate([{"distill": False}, {"distill_weight": 0.0}]):
        train(task, digits_spec(float_model, epochs=0.2, **options), tmp_path / str(index), CPU)
    config = FloatConfig(epochs=0.2).as_training()
    train(task, TrainSpec(train=config, seed=1), tmp_path / "float", CPU)
    assert task.built == 0


def test_a_resumed_trial_has_the_same_teacher(float_model, tmp_path):
    spec = digits_spec(float_model, epochs=1)
    expected = train(Taught(), spec, tmp_path / "whole", CPU)
    interrupted(Taught(), spec, tmp_path / "cut", 4)
    torch.manual_seed(99)
    assert outcome(train(Taught(), spec, tmp_path / "cut", CPU)) == outcome(expected)


def test_the_helper_switches_training_off():
    teacher = build_teacher(Taught(answer=nn.Sequential(nn.Linear(1, 1), nn.Dropout())))
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert build_teacher(Regression()) is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (3, r"^task: build_teacher\(\) returned int, not a module or None$"),
        (OSError("no\nweights"), r"^task: build_teacher\(\) failed with OSError: no weights$"),
        (UserError("task_args.teacher: no such file"), r"^task_args.teacher: no such file$"),
    ],
)
def test_teachers_that_fail_are_named_in_one_line(answer, message, tmp_path):
    class Failing(Regression):
        def build_teacher(self):
            if isinstance(answer, Exception):
                raise answer
            return answer

    with pytest.raises(UserError, match=message):
        train(Failing(), mlp_spec(distill=True), tmp_path, CPU)
