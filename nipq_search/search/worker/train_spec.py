"""What the training loop is asked to do for a job of a sweep, where, and on which device."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from nipq_search import blobs
from nipq_search.search import jobs
from nipq_search.search.config.space import split
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.jobs import Job, job_folder
from nipq_search.search.strategies.strategies import STRATEGIES
from nipq_search.train import TrainSpec


def train_spec(config: SweepConfig, job: Job) -> TrainSpec:
    """What the training loop is asked to do for a job."""
    float_file = jobs.model_file(job_folder(Path(job.out), "float", 0))
    if job.kind == "float":
        training = config.float_model.as_training()
        file = config.float_model.checkpoint
        if file is not None:
            # Loading is training of no step: the file is evaluated and stored as it is.
            return TrainSpec(
                train=training, seed=job.seed, float_model=Path(file), home=home_of(config, job)
            )
        return TrainSpec(train=training, seed=job.seed, home=home_of(config, job))
    quant = config.quant
    if job.kind == "baseline":
        quant = dataclasses.replace(
            quant,
            quantizer="lsq",
            weights=dataclasses.replace(quant.weights, bits=(job.number,)),
            activations=dataclasses.replace(quant.activations, bits=(job.number,)),
        )
    params, profile = split(job.params)
    training, parent, losses = config.train.with_hyperparameters(params), None, None
    if job.kind == "trial" and training.start == "sensitivity":
        record = jobs.committed(job_folder(Path(job.out), jobs.SCORES, 0)) or {}
        losses = {
            unit: {int(width): loss for width, loss in of_unit.items()}
            for unit, of_unit in record.get("losses", {}).items()
        }
    strategy = STRATEGIES[config.search.strategy]
    if job.kind == "trial":
        factor = 1.0 if job.parent is None else strategy.noise_factor
        training = dataclasses.replace(
            training,
            epochs=training.epochs * job.epochs_share,
            noise_share=training.noise_share * factor,
        )
    if job.parent is not None:
        parent = jobs.model_file(job_folder(Path(job.out), "trial", job.parent))
    return TrainSpec(
        train=training,
        seed=job.seed,
        quant=quant,
        budget=dict(job.budget) or None,
        float_model=float_file,
        parent=parent,
        profile=profile or None,
        pause=_pause(config, job),
        losses=losses,
        least_noise_steps=strategy.least_noise_steps if job.kind == "trial" else 0,
        home=home_of(config, job),
    )


def home_of(config: SweepConfig, job: Job) -> str | None:
    """Where a job's model and checkpoints lie, if not in its folder."""
    place = job.folder.relative_to(job.out)
    return blobs.within(config.checkpoints, config.name, *place.parts)


def _pause(config: SweepConfig, job: Job) -> float | None:
    """The share of the steps after which a job pauses."""
    rungs = STRATEGIES[config.search.strategy].rungs
    return rungs[job.rung] if job.kind == "trial" and job.rung < len(rungs) else None


def training_device(config: SweepConfig) -> torch.device:
    """Where this process trains: on its first GPU, if trials get one and there is one."""
    wanted = config.resources.gpus > 0 and torch.cuda.is_available()
    return torch.device("cuda" if wanted else "cpu")
