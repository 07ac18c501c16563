"""The models of a training: the float model, what teaches, what is trained, and what was."""

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
    elif bits is None or not stay_at_parent(model, budget, bits, learning):
        start_at_budget(model, budget, bits if start == "parent" else None, learning)


def load_trained(task: Task, spec: TrainSpec, path: Path, device: torch.device) -> nn.Module:
    """A trained model from its file: the float model, or a frozen quantized one."""
    if spec.quant is None:
        return load_float(task, path, spec.seed, device).eval()
    model = load_float(task, None, spec.seed, device)
    model, _ = prepare_for(task, model, spec, device, calibrated=False)
    model.load_state_dict(from_bytes(blobs.read(path))["model"])
    return model.eval()
