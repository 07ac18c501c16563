"""The task protocol: a model, its data, its loss and the metric that the search optimizes.

A task is any object with the members of `Task`; no base class is required. The functions in this
module call these members, check what they return, and provide a default for each optional member:

- `distill_loss(model, teacher, batch)`: a scalar loss that pulls `model` towards `teacher`;
- `build_teacher()`: a trained module to use as the teacher instead of the float model, or None;
- `num_samples(batch)`: the number of training samples in a batch;
- `to_device(batch, device)`: the batch, moved to a device;
- `take(batch, part)`: the samples of a batch that a slice selects;
- `load_data()`: reads the data into the task; called once, before the task is sent to the nodes;
- `input_bits`: 8 if the model's raw input is uint8 data, None otherwise;
- `dataset()`: the name, the split sizes and a digest of the data, as plain JSON types;
- `sample_keys(split)`: one hashable value per sample that identifies it, in any order; needed by
  the conformance tests if the first tensor of a batch does not distinguish the samples;
- `argument_sections`: dataclasses that group the constructor's arguments; `make_task` builds them
  as described in `common/sections.py`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nipq_search.errors import UserError, nearest

SplitT = TypeVar("SplitT")
"""The type that a task uses to store a split."""

SPLITS = ("train", "validation", "test")
"""Names of the splits: for training, for model selection, and for the final evaluation."""

REQUIRED = ("build_model", "example_inputs", "loader", "loss", "evaluate")
"""Methods that every task has."""


@runtime_checkable
class Task(Protocol):
    """The members that every task has. A batch is any object that `loader` yields.

    Attributes:
        metric: the name of an entry in the result of `evaluate`, and `max` or `min`.
    """

    metric: tuple[str, str]

    def build_model(self) -> nn.Module:
        """Return a new model; random weights are drawn from torch's default generator."""
        ...

    def example_inputs(self) -> tuple[Tensor, ...] | dict[str, Tensor]:
        """Return the arguments of one forward call with a batch size of one.

        The arguments are a tuple, or a dict of keyword arguments. Costs are computed for inputs
        of these shapes.
        """
        ...

    def loader(self, split: str, batch_size: int, seed: int | None) -> Iterable[Any]:
        """Return an iterable over one epoch of a split.

        Args:
            split: one of `SPLITS`.
            batch_size: samples per batch.
            seed: seed for the order and augmentation of the `train` split; equal seeds give equal
                batches. If the seed is None, and for the other splits, the order is fixed.

        Returns:
            The batches.
        """
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean task loss of a batch as a scalar; calibration uses this loss as well."""
        ...

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return metrics for a whole split, including `metric`.

        The training mode of every module is restored afterwards.
        """
        ...


def check_task(task: object) -> None:
    """Raise `UserError` unless `task` has every required member."""
    name = type(task).__name__
    missing = [member for member in REQUIRED if not callable(getattr(task, member, None))]
    if missing:
        raise UserError(f"task {name} lacks {', '.join(f'{member}()' for member in missing)}")
    metric = getattr(task, "metric", None)
    if (
        not isinstance(metric, tuple | list)
        or len(metric) != 2
        or not isinstance(metric[0], str)
        or metric[1] not in ("max", "min")
    ):
        raise UserError(
            f"task {name} needs metric = (NAME, 'max' or 'min'), such as ('accuracy', 'max')"
        )


def has_distillation(task: object) -> bool:
    """Whether the task defines a distillation loss."""
    return callable(getattr(task, "distill_loss", None))


def distill_loss(task: object, model: nn.Module, teacher: nn.Module, batch: Any) -> Tensor:
    """Return the task's distillation loss.

    Args:
        task: the task.
        model: the model to train.
        teacher: the trained model to imitate.
        batch: a batch of the task's loader.

    Returns:
        A scalar.

    Raises:
        UserError: the task defines no distillation loss.
    """
    method = getattr(task, "distill_loss", None)
    if method is None:
        raise UserError(
            f"task {type(task).__name__} has no distill_loss(): set train.distill to false"
        )
    loss: Tensor = method(model, teacher, batch)
    return loss


@contextlib.contextmanager
def _report_failure(call: str) -> Iterator[None]:
    """Turn any exception into a one-line `UserError` that names the task's method."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"task: {call} failed with {reason}") from error


def _initialized(model: object, call: str, expected: str = "a module") -> nn.Module:
    """Return `model`, the result of `call`, after checking that all its tensors have values."""
    if not isinstance(model, nn.Module):
        raise UserError(f"task: {call} returned {type(model).__name__}, not {expected}")
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(value):
            raise UserError(
                f"task: {call} left {name} uninitialized in a lazy module; "
                "run the model on a batch before returning it"
            )
        if value.is_meta:
            raise UserError(f"task: {call} left {name} on the meta device; load its weights")
    return model


def build_model(task: Task) -> nn.Module:
    """Return a new model for the task.

    Raises:
        UserError: the task's method fails, does not return a module, or leaves parameters without
            values.
    """
    with _report_failure("build_model()"):
        model = task.build_model()
    return _initialized(model, "build_model()")


def example_inputs(task: Task, device: torch.device | None = None) -> Any:
    """Return the task's example inputs, moved to `device` if one is given.

    Raises:
        UserError: the task's method fails.
    """
    with _report_failure("example_inputs()"):
        inputs = task.example_inputs()
    return inputs if device is None else move(inputs, device)


def build_teacher(task: object) -> nn.Module | None:
    """Return the task's own teacher, in evaluation mode and with gradients disabled.

    Returns:
        The teacher, or None if the float model is the teacher.

    Raises:
        UserError: the task's method fails, does not return a module, or leaves parameters without
            values.
    """
    method = getattr(task, "build_teacher", None)
    if method is None:
        return None
    with _report_failure("build_teacher()"):
        teacher = method()
    if teacher is None:
        return None
    module = _initialized(teacher, "build_teacher()", "a module or None")
    return module.eval().requires_grad_(False)


def num_samples(task: object, batch: Any) -> int:
    """Return the number of samples in a batch; the default is the length of its first tensor.

    Raises:
        UserError: the task defines no `num_samples`, and the batch has no tensor or begins with a
            scalar.
    """
    method = getattr(task, "num_samples", None)
    if method is not None:
        return int(method(batch))
    first = next(_tensors(batch), None)
    if first is None or first.ndim == 0:
        raise UserError(
            f"task {type(task).__name__} needs num_samples(batch): its batches contain no tensor, "
            "or the first one is a scalar"
        )
    return int(first.shape[0])


def to_device(task: object, batch: Any, device: torch.device | str) -> Any:
    """Return a batch, moved to a device.

    Args:
        task: the task. If it defines `to_device`, that method is used.
        batch: a batch of the task's loader.
        device: the target device.

    Returns:
        The batch on the device; by default, a copy of its nested containers with all tensors
        moved.
    """
    method = getattr(task, "to_device", None)
    return method(batch, device) if method is not None else move(batch, device)


def evaluate(task: Task, model: nn.Module, split: str) -> dict[str, float]:
    """Return the task's metrics on a split, computed in evaluation mode without gradients.

    Args:
        task: the task.
        model: the model; the training mode of every module is restored afterwards.
        split: one of `SPLITS`.

    Returns:
        The metrics by name.
    """
    with evaluating(model):
        return {name: float(value) for name, value in task.evaluate(model, split).items()}


def load_data(task: object) -> None:
    """Call the task's `load_data` if it has one.

    Raises:
        UserError: the data are invalid, or a file cannot be read.
    """
    method = getattr(task, "load_data", None)
    if method is not None:
        try:
            method()
        except PermissionError as error:
            raise UserError(unreadable(error)) from error


def unreadable(error: PermissionError) -> str:
    """Return a message that names the file or folder for which read permission is missing."""
    return f"{error.filename or error}: cannot be read: permission denied"


def input_bits(task: object) -> int | None:
    """Return the bit-width of the raw input, or None if the task declares none."""
    bits: int | None = getattr(task, "input_bits", None)
    return bits


def dataset(task: object) -> dict[str, Any]:
    """Return the result of the task's `dataset()`, with defaults for missing entries."""
    method = getattr(task, "dataset", None)
    given: Mapping[str, Any] = method() if method is not None else {}
    return {"name": type(task).__name__, "splits": {}, "digest": None, **given}


def named_split(splits: Mapping[str, SplitT], name: str) -> SplitT:
    """Return one of a task's splits, or raise `UserError` if the name is unknown."""
    if name not in splits:
        raise UserError(f"no split named '{name}'{nearest(name, splits)}")
    return splits[name]


def check_batch_size(size: int) -> None:
    """Raise `UserError` unless a batch size is positive."""
    if size < 1:
        raise UserError(f"batch_size {size} is not positive")


def move(batch: Any, device: torch.device | str) -> Any:
    """Return a copy of nested tuples, lists and mappings with every tensor moved to `device`."""
    return _mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def take(task: object, batch: Any, part: slice) -> Any:
    """Return the samples of a batch that a slice selects.

    Args:
        task: the task. If it defines `take`, that method is used.
        batch: a batch of the task's loader.
        part: the samples to select.

    Returns:
        A smaller batch. By default, the rows in `part` are selected from every tensor that is as
        long as the first one; everything else is unchanged.

    Raises:
        UserError: the task does not define `take`, and its first tensor does not have one row per
            sample.
    """
    method = getattr(task, "take", None)
    if method is not None:
        return method(batch, part)
    first = next(_tensors(batch), None)
    if first is None or first.ndim == 0 or len(first) != num_samples(task, batch):
        raise UserError(
            f"task {type(task).__name__}: its batches are not tensors with one row per sample, "
            "so a batch cannot be divided among processes; define take(batch, part), or give each "
            "trial a single process (resources.workers, resources.gpus)"
        )
    return _mapped(batch, lambda t: t[part] if t.ndim and len(t) == len(first) else t)


def _mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of nested containers with a function applied to every tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*(_mapped(value, function) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_mapped(value, function) for value in batch)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _tensors(value)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode without gradients, then restore the mode of every module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
