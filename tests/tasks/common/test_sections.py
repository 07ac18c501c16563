"""Sections of task arguments: flat in sweep files, dataclasses in Python."""

from __future__ import annotations

import dataclasses
import inspect
import pickle

import pytest
from sample_arguments import sample_arguments

from nipq_search.errors import UserError
from nipq_search.tasks import TASKS, ImageFolder, base, make_task
from nipq_search.tasks.common.sections import (
    argument_sections,
    flat_parameters,
    group_arguments,
)
from nipq_search.tasks.text.splits import TextSplits
from nipq_search.tasks.text.table import TextTable
from nipq_search.tasks.text.tokens import TextLengths
from nipq_search.tasks.vision.image_folder.data import ImageData
from nipq_search.tasks.vision.image_folder.models import ImageModel, ImageTeacher
from nipq_search.tasks.vision.image_folder.preprocessing import ImagePreprocessing

REQUIRED = inspect.Parameter.empty

LANGUAGE_MODELING = {
    "model": REQUIRED,
    "path": REQUIRED,
    "encoding": "utf-8",
    "block": 128,
    "validation": 0.1,
    "test": 0.1,
    "train_samples": None,
    "split_seed": 0,
    "train_from_scratch": False,
    "config": None,
    "dropout": 0.0,
    "hidden_weight": 0.0,
}

KEYS = {
    "image_folder": {
        "path": REQUIRED,
        "model": REQUIRED,
        "format": None,
        "image": "image",
        "label": "label",
        "weights": None,
        "weights_order": False,
        "teacher": None,
        "teacher_weights": "timm",
        "size": 224,
        "validation": None,
        "test": None,
        "train_samples": None,
        "validation_samples": None,
        "test_samples": None,
        "split_seed": 0,
        "augment": "none",
        "interpolation": None,
        "crop_pct": None,
        "mean": None,
        "std": None,
        "cache": "memory",
        "workers": 0,
        "label_smoothing": 0.0,
        "drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "norm_momentum": None,
        "channels_last": False,
    },
    "text_classification": {
        "model": REQUIRED,
        "path": REQUIRED,
        "text": REQUIRED,
        "label": REQUIRED,
        "text_pair": None,
        "labels": None,
        "group": None,
        "validation": 0.1,
        "test": 0.1,
        "deduplicate": True,
        "columns": None,
        "encoding": "utf-8",
        "max_length": 128,
        "example_length": None,
        "similar_lengths": False,
        "train_samples": None,
        "split_seed": 0,
        "train_from_scratch": False,
        "config": None,
        "dropout": 0.0,
        "hidden_weight": 0.0,
        "metric": "accuracy",
    },
    "masked_lm": {**LANGUAGE_MODELING, "mask_share": 0.15},
    "causal_lm": LANGUAGE_MODELING,
}
"""Keys and defaults of `task_args`, which must not change between versions."""

WITH_SECTIONS = sorted(name for name, factory in TASKS.items() if argument_sections(factory))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    deviation: float
    seed: int = 0


class Noisy(TASKS["digits"]):
    """A task with one section and one plain parameter."""

    argument_sections = {"noise": Noise}

    def __init__(self, noise, *, width=4):
        super().__init__(width=width)
        self.noise = noise


@pytest.mark.parametrize("name", WITH_SECTIONS)
def test_keys_and_defaults_of_task_args_are_stable(name):
    found = {key: parameter.default for key, parameter in flat_parameters(TASKS[name]).items()}
    assert found == KEYS[name]


@pytest.mark.parametrize("name", WITH_SECTIONS)
def test_sections_are_frozen_and_share_no_key(name):
    sections = argument_sections(TASKS[name])
    parameters = inspect.signature(TASKS[name]).parameters
    keys = [key for key in parameters if key not in sections]
    for parameter, section in sections.items():
        assert parameter in parameters
        assert section.__dataclass_params__.frozen
        assert all(field.kw_only for field in dataclasses.fields(section))
        keys += [field.name for field in dataclasses.fields(section)]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", WITH_SECTIONS)
def test_sections_survive_pickling_and_replacement(name, tmp_path):
    arguments = sample_arguments(name, tmp_path)
    for key, section in group_arguments(TASKS[name], arguments).items():
        if key in argument_sections(TASKS[name]):
            assert pickle.loads(pickle.dumps(section)) == section
            assert dataclasses.replace(section) == section
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(section, dataclasses.fields(section)[0].name, None)


def test_flat_arguments_and_sections_build_the_same_task(tmp_path):
    arguments = sample_arguments("image_folder", tmp_path)
    flat = make_task("image_folder", arguments)
    task = ImageFolder(
        data=ImageData(path=arguments["path"]),
        model=ImageModel(model=arguments["model"]),
        preprocessing=ImagePreprocessing(size=32, augment="imagenet"),
    )
    assert (task.data, task.model, task.teacher) == (flat.data, flat.model, flat.teacher)
    assert (task.crop, task.normalization) == (flat.crop, flat.normalization)
    assert base.dataset(task) == base.dataset(flat)


def test_own_tasks_can_have_sections():
    with TASKS.temporarily("noisy", Noisy):
        task = make_task("noisy", {"deviation": 0.5, "width": 8})
        assert (task.noise, task.width) == (Noise(deviation=0.5), 8)
        with pytest.raises(UserError, match=r"task_args.deviation: noisy needs this argument"):
            make_task("noisy")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("sise", r"image_folder has no such argument \(did you mean 'size'\?\)"),
        ("teacher_weight", r"image_folder has no such argument \(did you mean 'teacher_weights'"),
        ("smoothing", r"image_folder has no such argument \(did you mean 'label_smoothing'"),
        ("data", "image_folder has no such argument"),
    ],
)
def test_unknown_keys_are_rejected_in_every_section(tmp_path, key, message):
    arguments = {**sample_arguments("image_folder", tmp_path), key: 1}
    with pytest.raises(UserError, match=f"^task_args.{key}: {message}"):
        make_task("image_folder", arguments)


@pytest.mark.parametrize(
    ("section", "arguments", "key"),
    [
        (ImageData, {"path": "x", "cache": "disk"}, "cache"),
        (ImageData, {"path": "x", "test_samples": 0}, "test_samples"),
        (ImageData, {"path": "x", "validation": 2}, "validation"),
        (ImagePreprocessing, {"augment": "strong"}, "augment"),
        (ImagePreprocessing, {"interpolation": "cubic"}, "interpolation"),
        (ImagePreprocessing, {"std": 0}, "std"),
        (ImageModel, {"model": "resnet18", "drop_rate": 1}, "drop_rate"),
        (ImageTeacher, {"teacher": "resnet_18"}, "teacher"),
        (TextTable, {"path": "x", "text": "t", "label": "l", "deduplicate": 1}, "deduplicate"),
        (TextSplits, {"validation": 0.7, "test": 0.3}, "validation"),
        (TextLengths, {"max_length": 16, "example_length": 17}, "example_length"),
    ],
)
def test_a_section_checks_its_arguments(section, arguments, key):
    with pytest.raises(UserError, match=f"^task_args.{key}: "):
        section(**arguments)
