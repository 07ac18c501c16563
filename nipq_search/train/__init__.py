"""One training loop, its phases and its checkpoints. Needs torch alone."""

from nipq_search.train.config import HYPERPARAMETERS, FloatConfig, TrainConfig
from nipq_search.train.loop import NonFiniteLoss, Trainer
from nipq_search.train.spec import Hooks, Interrupted, Paused, TrainResult, TrainSpec
from nipq_search.train.trial import train

__all__ = [
    "HYPERPARAMETERS",
    "FloatConfig",
    "Hooks",
    "Interrupted",
    "NonFiniteLoss",
    "Paused",
    "TrainConfig",
    "TrainResult",
    "TrainSpec",
    "Trainer",
    "train",
]
