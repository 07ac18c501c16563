"""The training of one model: phases, loop, checkpoints.

Start reading in `trial.py`, which runs the phases of a training run, then in `loop.py`, which
runs its steps. `config.py` defines the settings; `models.py` creates and loads the models.
`stability/` contains methods that reduce oscillation; `starts/` chooses the initial bit-widths.
This layer imports `tasks`, `cost` and `quant`, and requires only torch, numpy and scipy.
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
