"""A whole training from its specification: the float model's, a trial's, a baseline's.

Phases of a trial: calibrate, noise phase, project and freeze bits, tuning phase, re-estimate
normalization statistics, evaluate. It can be killed at any moment and run again: it continues
from its last checkpoint and ends with the same bits.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nipq_search import blobs, storage
from nipq_search.cost import Budget, exact_costs, freeze
from nipq_search.quant import QUANTIZERS, bit_config, reestimate_norm_stats
from nipq_search.records import CurvePoint
from nipq_search.tasks import Task
from nipq_search.tasks.base import evaluate, num_samples, to_device
from nipq_search.train.checkpoint import load_checkpoint, save_checkpoint, to_bytes
from nipq_search.train.forward import arithmetic
from nipq_search.train.loop import Trainer, seed_for, steps_in
from nipq_search.train.models import MODEL_FILE, load_float, prepare_for, teacher_of
from nipq_search.train.parallel import ALONE, Team
from nipq_search.train.schedule import Schedule, make_schedule
from nipq_search.train.spec import Hooks, Interrupted, Paused, Released, TrainResult, TrainSpec


def train(
    task: Task,
    spec: TrainSpec,
    folder: Path,
    device: torch.device,
    hooks: Hooks | None = None,
    team: Team = ALONE,
    model_folder: Path | None = None,
) -> TrainResult:
    """Train to the end, or continue what an earlier call in `folder` began.

    Writes checkpoints below `folder/checkpoints` and the model, as `model.pt`, to its folder. The
    caller removes the checkpoints once the result is safe.

    Args:
        task: model and data.
        spec: what to train.
        folder: the training's own folder.
        device: where to train.
        hooks: reports and stop requests; of several processes the leader's are heard.
        team: the processes that train together; each calls this.
        model_folder: where the model is to lie, if not in `folder`.

    Raises:
        Released: this process does not lead: its part is done.
        Interrupted: `should_stop` said so; the state is saved.
        Paused: `spec.pause` is reached; the state is saved.
        NonFiniteLoss: the loss became NaN or infinite.
        UserError: the float model cannot be read, or the budget cannot be reached.
    """
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        return _train(task, spec, folder, device, hooks or Hooks(), team, model_folder or folder)


def _train(
    task: Task,
    spec: TrainSpec,
    folder: Path,
    device: torch.device,
    hooks: Hooks,
    team: Team,
    model_folder: Path,
) -> TrainResult:
    model = load_float(task, spec.float_model, spec.seed, device)
    if spec.quant is None and spec.float_model is not None:
        _only_leader(team)
        return _finish(task, spec, model_folder, model, device, Counts(), hooks)
    loader = task.loader("train", spec.train.batch_size, seed_for(spec.seed, 0))
    batches = steps_in(loader)
    schedule = _schedule(spec, batches)
    if 0 < schedule.noise < spec.least_noise_steps:
        spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, noise_share=0.0))
        schedule = _schedule(spec, batches)
    teacher = None
    checkpoint = team.given(load_checkpoint(folder / "checkpoints") if team.leads else None)
    calibration_samples = 0
    if spec.quant is not None:
        if spec.train.distill and spec.train.distill_weight > 0:
            teacher = teacher_of(task, model, spec.seed, device)
        model, calibration_samples = prepare_for(
            task, model, spec, device, calibrated=checkpoint is None
        )
        hooks.on_samples(calibration_samples)
    team.same_model(model)
    trainer = Trainer(
        task=task,
        model=model,
        config=spec.train,
        schedule=schedule,
        seed=spec.seed,
        device=device,
        # One width for all is not projected: it stays as it is.
        budget=Budget(**spec.budget) if spec.budget and spec.train.start != "uniform" else None,
        teacher=teacher,
        team=team,
    )
    trainer.samples = calibration_samples
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint)
    counted = trainer.samples
    total = trainer.schedule.total
    pause = total if spec.pause is None else max(1, round(spec.pause * total))

    def count() -> None:
        nonlocal counted
        hooks.on_samples(trainer.samples - counted)
        counted = trainer.samples

    def stop() -> bool:
        count()
        return trainer.step >= pause or hooks.should_stop()

    def on_epoch(point: CurvePoint) -> None:
        count()  # before what is reported is saved
        hooks.on_epoch(point)

    def save(state: dict[str, Any]) -> None:
        hooks.before_write()
        place = folder / "checkpoints"
        save_checkpoint(place, trainer.step, state, spec.home, fence=hooks.before_write)

    try:
        finished = trainer.step < pause and trainer.run(
            on_epoch=on_epoch, save=save, should_stop=stop
        )
    finally:
        count()  # samples of a step that failed too
    _only_leader(team)
    if not finished and trainer.step >= pause < total:
        raise _at_pause(task, spec, trainer, device, hooks)
    if trainer.step < total:
        raise Interrupted
    trainer.use_average()
    counts = Counts(samples=trainer.samples, steps=trainer.step, history=tuple(trainer.history))
    result = _finish(task, spec, model_folder, model, device, counts, hooks)
    hooks.on_samples(result.samples - counted)
    return result


def _only_leader(team: Team) -> None:
    """End the part of every other process: what follows is not shared."""
    if not team.leads:
        raise Released


def _schedule(spec: TrainSpec, batches_per_epoch: int) -> Schedule:
    """The steps of a training's phases."""
    return make_schedule(
        epochs=spec.train.epochs,
        batches_per_epoch=batches_per_epoch,
        accumulate=spec.train.accumulate,
        noise_share=spec.train.noise_share,
        warmup=spec.train.warmup,
        quantized=spec.quant is not None,
        learns_bits=spec.quant is not None and QUANTIZERS[spec.quant.quantizer].learns_bits,
    )


def _at_pause(
    task: Task, spec: TrainSpec, trainer: Trainer, device: torch.device, hooks: Hooks
) -> Paused:
    """Validation figures of a copy on its budget: a model still above it would look better."""
    model = copy.deepcopy(trainer.model)
    if trainer.average is not None:
        trainer.average.copy_to(model)
    freeze(model, trainer.budget)
    samples = _reestimate(task, spec, model, device)
    hooks.on_samples(samples)
    with arithmetic(spec.train.precision, device):
        return Paused(evaluate(task, model, "validation"), samples)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a training processed, and what its bit-widths did."""

    samples: int = 0
    steps: int = 0
    history: Sequence[Mapping[str, Any]] = ()


def _reestimate(task: Task, spec: TrainSpec, model: nn.Module, device: torch.device) -> int:
    """Re-estimate normalization statistics of a quantized model; the samples that it took."""
    samples = 0
    if spec.quant is None or not spec.train.norm_batches:
        return samples

    def batches(observed: nn.Module) -> None:
        nonlocal samples
        seed = seed_for(spec.seed, 1 << 41)
        loader = task.loader("train", spec.train.batch_size, seed)
        first = 0
        for batch in itertools.islice(iter(loader), spec.train.norm_batches):
            count = num_samples(task, batch)
            first = first or count
            if count < first:
                continue  # in the average a partial batch would weigh as much as a full one
            samples += count
            task.loss(observed, to_device(task, batch, device))

    with arithmetic(spec.train.precision, device):
        reestimate_norm_stats(model, batches)
    return samples


def _finish(
    task: Task,
    spec: TrainSpec,
    folder: Path,
    model: nn.Module,
    device: torch.device,
    counts: Counts,
    hooks: Hooks,
) -> TrainResult:
    """Re-estimate normalization statistics, evaluate, store the model."""
    samples = _reestimate(task, spec, model, device)
    with arithmetic(spec.train.precision, device):
        metrics = evaluate(task, model, "validation")
    data = to_bytes({"model": model.state_dict()})
    hooks.before_write()
    blobs.write(folder / MODEL_FILE, data, spec.home)
    return TrainResult(
        metrics=metrics,
        cost=exact_costs(model) if spec.quant is not None else {},
        bits=bit_config(model) if spec.quant is not None else {},
        samples=counts.samples + samples,
        steps=counts.steps,
        model_sha256=storage.digest(data),
        history=counts.history,
    )
