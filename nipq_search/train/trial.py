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
from nipq_search.errors import UserError
from nipq_search.quant import (
    QUANTIZERS,
    Proxy,
    bit_config,
    prepare,
    quantizers,
    reestimate_norm_stats,
)
from nipq_search.quant.fit import fit_ranges
from nipq_search.records import CurvePoint
from nipq_search.tasks import Task
from nipq_search.tasks.base import (
    build_model,
    build_teacher,
    evaluate,
    example_inputs,
    input_bits,
    num_samples,
    to_device,
)
from nipq_search.train.checkpoint import (
    from_bytes,
    load_checkpoint,
    save_checkpoint,
    to_bytes,
)
from nipq_search.train.forward import arithmetic
from nipq_search.train.loop import Trainer, seed_for, steps_in
from nipq_search.train.memory_format import use_channels_last
from nipq_search.train.parallel import ALONE, Team
from nipq_search.train.schedule import Schedule, make_schedule
from nipq_search.train.spec import Hooks, Interrupted, Paused, Released, TrainResult, TrainSpec
from nipq_search.train.start import (
    start_at_budget,
    start_at_one_width,
    start_at_profile,
    start_at_scores,
    stop_learning_bits,
    warm_start,
)

MODEL_FILE = "model.pt"


def load_float(task: Task, path: Path | None, seed: int, device: torch.device) -> nn.Module:
    """The task's float model, with the weights in `path` if given.

    Raises:
        UserError: the model cannot be built, or the file is missing or does not fit it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(task)
    if path is not None:
        try:
            state = from_bytes(blobs.read(path))
            state = state.get("model", state)
            if missing := [key for key in model.state_dict() if key not in state]:
                raise UserError(
                    f"float model {path}: {len(missing)} entries are missing, such as "
                    f"{', '.join(missing[:3])}; give the state dict of this task's whole model"
                )
            model.load_state_dict(state)
        except (UserError, blobs.StoreAway):
            raise
        except (OSError, RuntimeError, AttributeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"float model {path}: {reason[:300]}") from error
        except Exception as error:  # torch raises its own kinds for files that are no checkpoints
            raise UserError(f"float model {path}: not a file of torch.save'd weights") from error
    return use_channels_last(model.to(device), example_inputs(task, device))


def teacher_of(task: Task, model: nn.Module, seed: int, device: torch.device) -> nn.Module:
    """What teaches: the task's own teacher, or else a copy of the float model.

    Raises:
        UserError: the task's teacher cannot be built.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        own = build_teacher(task)
    if own is not None:
        return use_channels_last(own.to(device), example_inputs(task, device))
    return copy.deepcopy(model).eval().requires_grad_(False)


def prepare_for(
    task: Task, model: nn.Module, spec: TrainSpec, device: torch.device, calibrated: bool = True
) -> tuple[nn.Module, int]:
    """The prepared model of a trial, and the samples that calibration processed.

    Without `calibrated` the boundaries mean nothing and a state dict is to be loaded.
    """
    assert spec.quant is not None
    quant = dataclasses.replace(
        spec.quant,
        seed=spec.seed,
        proxy=Proxy(spec.train.proxy or spec.quant.proxy),
        input_bits=spec.quant.input_bits or input_bits(task),
    )
    samples = 0

    def shown(observed: nn.Module, batches: int) -> None:
        nonlocal samples
        loader = task.loader("train", spec.train.batch_size, seed_for(spec.seed, 1 << 40))
        for batch in itertools.islice(iter(loader), batches):
            samples += num_samples(task, batch)
            task.loss(observed, to_device(task, batch, device))

    def calibration(observed: nn.Module) -> None:
        shown(observed, spec.train.calibration_batches)

    example = example_inputs(task, device)
    first = calibrated and spec.parent is None  # a parent's grids and boundaries are its child's
    prepared = prepare(model, example, quant, calibration=calibration if first else None)
    if spec.train.start == "uniform":
        stop_learning_bits(prepared)
    if calibrated:
        before = None
        if spec.parent is not None:
            before = warm_start(prepared, from_bytes(blobs.read(spec.parent))["model"])
        _start_bits(prepared, spec, before)
        if spec.train.fit_ranges or before is not None:
            fit_ranges(prepared, lambda observed: shown(observed, 1), before)
    return prepared, samples


def _start_bits(model: nn.Module, spec: TrainSpec, bits: Mapping[str, float] | None) -> None:
    """Put bit-widths where they start; `bits` are the parent's, if there is one."""
    start = spec.train.start
    if start != "parent":
        for quantizer in quantizers(model).values():
            quantizer.bits.marginal.zero_()  # a parent's are those of its own widths
    assert spec.quant is not None
    if not spec.budget or start == "config":
        return
    budget = Budget(**spec.budget)
    # Fixed at once where nothing is learned: ranges are to be fitted to the widths that stay.
    learning = QUANTIZERS[spec.quant.quantizer].learns_bits and spec.train.noise_share > 0
    if spec.profile:
        start_at_profile(model, budget, spec.profile, learning)
    elif start == "sensitivity":
        if spec.losses is None:
            raise UserError("train.start: `sensitivity` needs the scores of a sweep")
        start_at_scores(model, budget, spec.losses, learning)
    elif start == "uniform":
        start_at_one_width(model, budget)
    else:
        start_at_budget(model, budget, bits if start == "parent" else None, learning)


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
        save_checkpoint(folder / "checkpoints", trainer.step, state, spec.home)

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


def load_trained(task: Task, spec: TrainSpec, path: Path, device: torch.device) -> nn.Module:
    """A trained model from its file: the float model, or a frozen quantized one."""
    if spec.quant is None:
        return load_float(task, path, spec.seed, device).eval()
    model = load_float(task, None, spec.seed, device)
    model, _ = prepare_for(task, model, spec, device, calibrated=False)
    model.load_state_dict(from_bytes(blobs.read(path))["model"])
    return model.eval()
