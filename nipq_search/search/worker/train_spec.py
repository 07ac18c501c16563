"""The arguments of a job's training run: its `TrainSpec`, storage location and device."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from nipq_search import blobs
from nipq_search.quant import QuantConfig
from nipq_search.search import jobs
from nipq_search.search.config.space import split
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.jobs import Job, job_folder
from nipq_search.search.strategies.strategies import STRATEGIES
from nipq_search.train import TrainConfig, TrainSpec


def train_spec(config: SweepConfig, job: Job) -> TrainSpec:
    """Return the specification of a job's training run."""
    if job.kind == "float":
        file = config.float_model.checkpoint
        return TrainSpec(
            train=config.float_model.as_training(),
            seed=job.seed,
            # A given checkpoint is evaluated and stored as is, without training.
            float_model=None if file is None else Path(file),
            home=store_uri(config, job),
        )
    out = Path(job.out)
    params, profile = split(job.params)
    training = config.train.with_hyperparameters(params)
    parent = losses = None
    if job.kind == "trial" and training.start == "sensitivity":
        losses = _sensitivity_losses(out)
    if job.parent is not None:
        parent = jobs.model_file(job_folder(out, "trial", job.parent))
    strategy = STRATEGIES[config.search.strategy]
    return TrainSpec(
        train=_schedule(config, job, training),
        seed=job.seed,
        quant=_quant(config, job),
        budget=dict(job.budget) or None,
        float_model=jobs.model_file(job_folder(out, "float", 0)),
        parent=parent,
        profile=profile or None,
        pause=_pause_share(config, job),
        losses=losses,
        least_noise_steps=strategy.least_noise_steps if job.kind == "trial" else 0,
        home=store_uri(config, job),
    )


def _quant(config: SweepConfig, job: Job) -> QuantConfig:
    """Return the quantization of a job; a baseline uses LSQ at one fixed bit-width."""
    quant = config.quant
    if job.kind != "baseline":
        return quant
    return dataclasses.replace(
        quant,
        quantizer="lsq",
        weights=dataclasses.replace(quant.weights, bits=(job.number,)),
        activations=dataclasses.replace(quant.activations, bits=(job.number,)),
    )


def _schedule(config: SweepConfig, job: Job, training: TrainConfig) -> TrainConfig:
    """Return the training configuration of a job.

    The strategy determines how many of the epochs a trial trains for, and the factor by which the
    noise phase of a warm start is scaled.
    """
    if job.kind != "trial":
        return training
    strategy = STRATEGIES[config.search.strategy]
    factor = 1.0 if job.parent is None else strategy.noise_factor
    return dataclasses.replace(
        training,
        epochs=training.epochs * job.epochs_share,
        noise_share=training.noise_share * factor,
    )


def _sensitivity_losses(out: Path) -> dict[str, dict[int, float]]:
    """Return the sensitivity scores by unit and bit-width; empty if they were not measured."""
    record = jobs.committed_record(job_folder(out, jobs.SCORES, 0)) or {}
    return {
        unit: {int(width): loss for width, loss in by_width.items()}
        for unit, by_width in record.get("losses", {}).items()
    }


def store_uri(config: SweepConfig, job: Job) -> str | None:
    """Return the URI under which an object store holds a job's model and checkpoints.

    The result is None if they are stored in the job's folder instead.
    """
    place = job.folder.relative_to(job.out)
    return blobs.object_uri(config.checkpoints, config.name, *place.parts)


def _pause_share(config: SweepConfig, job: Job) -> float | None:
    """Return the fraction of the steps after which a job pauses; None if it never pauses."""
    rungs = STRATEGIES[config.search.strategy].rungs
    return rungs[job.rung] if job.kind == "trial" and job.rung < len(rungs) else None


def training_device(config: SweepConfig) -> torch.device:
    """Return the first GPU if `resources.gpus` is set and CUDA is available; otherwise the CPU."""
    use_gpu = config.resources.gpus > 0 and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")
