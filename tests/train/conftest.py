"""Fixtures for the tests of training: a float model for digits, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_tasks import CPU, SpiedDigits

from nipq_search.train import FloatConfig, TrainSpec, train
from nipq_search.train.models import MODEL_FILE


@pytest.fixture(scope="session")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    config = FloatConfig(epochs=2, batch_size=128).as_training()
    train(SpiedDigits(), TrainSpec(train=config, seed=1), folder, CPU)
    return folder / MODEL_FILE


@pytest.fixture
def digits() -> SpiedDigits:
    return SpiedDigits()
