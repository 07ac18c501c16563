"""A sample of the zoo (`benchmarks/zoo.py`): third-party models, prepared unmodified."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import zoo
import zoo_models

TIMM = [
    "test_byobnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_nfnet",  # standardizes its weights
    "test_resnet",
    "test_vit",
    "tf_mobilenetv3_small_minimal_100",  # pads inside its convolutions
    "efficientvit_m0",
]


def outcome(make):
    name, model, inputs = make()
    found = zoo.try_model(model, inputs)
    return found["failures"], found["float_share"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name):
    assert outcome(lambda: zoo_models.make_timm(name)) == ([], 0.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(zoo_models.TRANSFORMERS))
def test_architectures_of_transformers(name):
    failures, _ = outcome(lambda: zoo_models.make_transformer(name))
    assert failures == []
