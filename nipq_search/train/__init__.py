"""The training of one model: phases, loop, checkpoints.

Start reading in `trial.py`, which runs the phases of one training, then `loop.py`, which runs
their steps. `config.py` has the settings, `models.py` makes and loads the models, `stability/`
and `starts/` hold options. Imports `tasks`, `cost` and `quant`, and needs torch alone.
"""

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
