"""Invalid models and example inputs of a task raise one-line errors before training."""

import pytest
import torch
from torch import nn

from nipq_search.errors import UserError
from nipq_search.tasks.base import build_model, build_teacher, example_inputs
from nipq_search.train.models import load_float

CPU = torch.device("cpu")


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(2, 2))


def statistics_on_meta() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3, affine=False))
    model[1].to("meta")
    return model


class Broken:
    """A task with one image, whose methods return or raise `model` and `example`."""

    metric = ("accuracy", "max")

    def __init__(self, model=None, example=None):
        self.model = model
        self.example = example

    def build_model(self):
        return self._given(self.model, lambda: nn.Sequential(nn.Conv2d(3, 4, 3)))

    def build_teacher(self):
        return self.build_model()

    def example_inputs(self):
        return self._given(self.example, lambda: (torch.zeros(1, 3, 8, 8),))

    @staticmethod
    def _given(answer, usual):
        if isinstance(answer, Exception):
            raise answer
        return usual() if answer is None else answer() if callable(answer) else answer


LAZY = r"^task: build_model\(\) left 0.weight uninitialized in a lazy module; run the model on a"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OSError("no\nweights"), r"^task: build_model\(\) failed with OSError: no weights$"),
        (UserError("task_args.model: none"), r"^task_args.model: none$"),
        (7, r"^task: build_model\(\) returned int, not a module$"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), LAZY),
        (lambda: nn.Sequential(nn.LazyLinear(4)), LAZY),
        (on_meta, r"^task: build_model\(\) left 0.weight on the meta device; load its weights$"),
        (statistics_on_meta, r"left 1.running_mean on the meta device"),
    ],
)
def test_models_that_cannot_be_had_are_refused(model, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build_model(Broken(model))
    with pytest.raises(UserError, match=message):
        load_float(Broken(model), None, 0, CPU)
    with pytest.raises(UserError, match=message):  # before the checkpoint is read
        load_float(Broken(model), tmp_path / "none.pt", 0, CPU)


def test_teachers_are_held_to_the_same():
    with pytest.raises(UserError, match=r"^task: build_teacher\(\) left 0.weight uninitialized"):
        build_teacher(Broken(lambda: nn.Sequential(nn.LazyLinear(4))))
    with pytest.raises(UserError, match=r"^task: build_teacher\(\) left 0.weight on the meta"):
        build_teacher(Broken(on_meta))


def test_an_example_that_cannot_be_made_is_reported_in_one_line():
    message = r"^task: example_inputs\(\) failed with ValueError: no data here$"
    broken = Broken(example=ValueError("no\n data here"))
    with pytest.raises(UserError, match=message):
        example_inputs(broken)
    with pytest.raises(UserError, match=message):
        load_float(broken, None, 0, CPU)


def test_a_lazy_model_that_ran_once_is_like_any_other():
    def ran() -> nn.Module:
        model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2))
        model(torch.zeros(1, 3, 8, 8))
        return model

    model = load_float(Broken(ran), None, 0, CPU)
    assert model(torch.ones(2, 3, 8, 8)).shape == (2, 2)
