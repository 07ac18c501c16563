"""The models of a training run: float model, teacher, prepared model and trained model."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from nipq_search import blobs
from nipq_search.cost import Budget
from nipq_search.errors import UserError
from nipq_search.quant import QUANTIZERS, Proxy, prepare, quantizers
from nipq_search.quant.tools.fit import fit_ranges
from nipq_search.tasks import Task
from nipq_search.tasks.base import (
    build_model,
    build_teacher,
    example_inputs,
    input_bits,
    num_samples,
    to_device,
)
from nipq_search.train.checkpoint import from_bytes
from nipq_search.train.config import BitStart
from nipq_search.train.loop import seed_for
from nipq_search.train.memory_format import use_channels_last
from nipq_search.train.spec import TrainSpec
from nipq_search.train.starts.start import (
    start_at_budget,
    start_at_one_width,
    start_at_profile,
    start_at_scores,
    stay_at_parent,
    stop_learning_bits,
    warm_start,
)

MODEL_FILE = "model.pt"
"""Name of the file with a trained model's state dict."""


def load_float(task: Task, path: Path | None, seed: int, device: torch.device) -> nn.Module:
    """Build the task's float model and load the weights in `path`, if given.

    Args:
        task: model and data.
        path: file with a state dict; None keeps the weights with which the task builds the model.
        seed: seed for building the model.
        device: device of the model.

    Returns:
        The float model; on CPUs, in the channels-last memory format if the model supports it.

    Raises:
        UserError: the model cannot be built, or the file is missing or does not match the model.
        blobs.StoreUnavailable: the object store cannot be reached or denies access.
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
                    f"{', '.join(missing[:3])}; give the complete state dict of this task's model"
                )
            model.load_state_dict(state)
        except (UserError, blobs.StoreUnavailable):
            raise
        except (OSError, RuntimeError, AttributeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"float model {path}: {reason[:300]}") from error
        except Exception as error:  # torch raises various errors for other kinds of files
            raise UserError(f"float model {path}: not saved by torch.save") from error
    return use_channels_last(model.to(device), example_inputs(task, device))


def teacher_of(task: Task, model: nn.Module, seed: int, device: torch.device) -> nn.Module:
    """Return the teacher for distillation: the task's own or, if it has none, the float model.

    Args:
        task: model and data.
        model: the float model.
        seed: seed for building the task's teacher.
        device: device of the teacher.

    Returns:
        A trained model in eval mode: the task's own teacher, or a copy of the float model.

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
    """Prepare the model of a trial.

    Args:
        task: model and data.
        model: the float model.
        spec: quantization, training settings, starting point and seed.
        device: device of the model.
        calibrated: whether to set starting values; otherwise, they are arbitrary and the caller
            must load a state dict.

    Returns:
        The prepared model, and the number of training samples that calibration and `fit_ranges`
        processed.

    Raises:
        UserError: the model cannot be prepared, the budget cannot be reached, or sensitivity
            scores are missing.
        OSError: the parent's model file cannot be read.
        RuntimeError: the parent's model file does not match the model.
    """
    assert spec.quant is not None
    quant = dataclasses.replace(
        spec.quant,
        seed=spec.seed,
        proxy=Proxy(spec.train.proxy or spec.quant.proxy),
        input_bits=spec.quant.input_bits or input_bits(task),
    )
    samples = 0

    def run_batches(observed: nn.Module, batches: int) -> None:
        nonlocal samples
        loader = task.loader("train", spec.train.batch_size, seed_for(spec.seed, 1 << 40))
        for batch in itertools.islice(iter(loader), batches):
            samples += num_samples(task, batch)
            task.loss(observed, to_device(task, batch, device))

    def calibration(observed: nn.Module) -> None:
        run_batches(observed, spec.train.calibration_batches)

    example = example_inputs(task, device)
    first = calibrated and spec.parent is None  # a parent's grids and boundaries are inherited
    prepared = prepare(model, example, quant, calibration=calibration if first else None)
    if spec.train.start == BitStart.UNIFORM:
        stop_learning_bits(prepared)
    if calibrated:
        before = None
        if spec.parent is not None:
            before = warm_start(prepared, from_bytes(blobs.read(spec.parent))["model"])
        _start_bits(prepared, spec, before)
        if spec.train.fit_ranges or before is not None:
            fit_ranges(prepared, lambda observed: run_batches(observed, 1), before)
    return prepared, samples


def _start_bits(model: nn.Module, spec: TrainSpec, bits: Mapping[str, float] | None) -> None:
    """Set the starting bit-widths; `bits` are those of the parent, None without a parent."""
    start = spec.train.start
    if start != BitStart.PARENT:
        for quantizer in quantizers(model).values():
            quantizer.bits.marginal.zero_()  # a parent's value is valid only at its own widths
    assert spec.quant is not None
    if not spec.budget or start == BitStart.CONFIG:
        return
    budget = Budget(**spec.budget)
    # Widths that are not learned are frozen here, since ranges are fitted to the final widths.
    learning = QUANTIZERS[spec.quant.quantizer].learns_bits and spec.train.noise_share > 0
    if spec.profile:
        start_at_profile(model, budget, spec.profile, learning)
    elif start == BitStart.SENSITIVITY:
        if spec.losses is None:
            raise UserError("train.start: `sensitivity` needs scores, which only a sweep measures")
        start_at_scores(model, budget, spec.losses, learning)
    elif start == BitStart.UNIFORM:
        start_at_one_width(model, budget)
    elif bits is None or not stay_at_parent(model, budget, bits, learning):
        start_at_budget(model, budget, bits if start == BitStart.PARENT else None, learning)


def load_trained(task: Task, spec: TrainSpec, path: Path, device: torch.device) -> nn.Module:
    """Load a trained model, either the float model or a frozen quantized one.

    Args:
        task: model and data.
        spec: specification with which the model was trained.
        path: file of the model.
        device: device of the model.

    Returns:
        The model in eval mode.

    Raises:
        UserError: the model cannot be built, or the file of a float model is missing or does not
            match the model.
        OSError: the file of a quantized model cannot be read.
        RuntimeError: the file of a quantized model does not match the model.
    """
    if spec.quant is None:
        return load_float(task, path, spec.seed, device).eval()
    model = load_float(task, None, spec.seed, device)
    model, _ = prepare_for(task, model, spec, device, calibrated=False)
    model.load_state_dict(from_bytes(blobs.read(path))["model"])
    return model.eval()
