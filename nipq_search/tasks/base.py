"""What a task is: a model, its data, its loss and the figure that the search maximizes.

A task is any object with the members of `Task`; it need not inherit from anything. The functions
here supply the optional members where a task has none, so that the callers never ask twice:

- `distill_loss(model, teacher, batch)`: scalar term that pulls `model` towards `teacher`;
- `build_teacher()`: a trained module that teaches in the float model's place, or None;
- `num_samples(batch)`: training samples in a batch;
- `to_device(batch, device)`: the batch on a device;
- `take(batch, part)`: some samples of a batch, a slice of them;
- `load_data()`: reads the data into the task, called once before it is shipped to the nodes;
- `input_bits`: 8 where the model's raw input is uint8 data, else None;
- `dataset()`: name, sizes of the splits and a digest of the data, as plain JSON types;
- `sample_keys(split)`: one hashable value per sample that tells it from all others, in any order;
  the tests ask for it where the first tensors of a batch do not tell samples apart.
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

Part = TypeVar("Part")
"""What a task keeps of a split."""

SPLITS = ("train", "validation", "test")
"""Names of the splits: training, selection, and the one that is read at the very end."""

REQUIRED = ("build_model", "example_inputs", "loader", "loss", "evaluate")
"""Methods that every task has."""


@runtime_checkable
class Task(Protocol):
    """The members that every task has. A batch is whatever `loader` yields.

    Attributes:
        metric: name of an entry of `evaluate`'s result, and `max` or `min`.
    """

    metric: tuple[str, str]

    def build_model(self) -> nn.Module:
        """Return a new, untrained model; its starting weights come from torch's default RNG."""
        ...

    def example_inputs(self) -> tuple[Tensor, ...] | dict[str, Tensor]:
        """Return the arguments of one forward call, with a batch of one.

        They are a tuple, or a dict of keywords. Their shapes are those that costs count.
        """
        ...

    def loader(self, split: str, batch_size: int, seed: int | None) -> Iterable[Any]:
        """Yield one epoch of a split.

        The `train` split is shuffled and augmented as `seed` says, so that equal seeds give
        equal batches; without a seed, and on the other splits, it comes in a fixed order.
        """
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean task loss of a batch, a scalar; calibration calls it too."""
        ...

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return figures of a whole split, `metric` among them; the model's modes survive."""
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
    """Whether the task can pull a model towards a teacher."""
    return callable(getattr(task, "distill_loss", None))


def distill_loss(task: object, model: nn.Module, teacher: nn.Module, batch: Any) -> Tensor:
    """The task's distillation term; `UserError` where it has none."""
    own = getattr(task, "distill_loss", None)
    if own is None:
        raise UserError(
            f"task {type(task).__name__} has no distill_loss(): set train.distill to false"
        )
    loss: Tensor = own(model, teacher, batch)
    return loss


@contextlib.contextmanager
def _told_as(call: str) -> Iterator[None]:
    """Say in one line which of the task's own calls failed."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"task: {call} failed with {reason}") from error


def _in_memory(model: object, call: str, wanted: str = "a module") -> nn.Module:
    """The module that a call gave, with a value in every parameter and buffer."""
    if not isinstance(model, nn.Module):
        raise UserError(f"task: {call} returned {type(model).__name__}, not {wanted}")
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(value):
            raise UserError(
                f"task: {call} left {name} uninitialized, in a lazy module; "
                "run the model on a batch there, once"
            )
        if value.is_meta:
            raise UserError(f"task: {call} left {name} on the meta device; load its weights")
    return model


def build_model(task: Task) -> nn.Module:
    """The task's new model.

    Raises:
        UserError: it cannot be built, is no module, or has parameters without values.
    """
    with _told_as("build_model()"):
        model = task.build_model()
    return _in_memory(model, "build_model()")


def example_inputs(task: Task, device: torch.device | None = None) -> Any:
    """The task's arguments of one forward call, on a device if given.

    Raises:
        UserError: the task fails to make them.
    """
    with _told_as("example_inputs()"):
        inputs = task.example_inputs()
    return inputs if device is None else move(inputs, device)


def build_teacher(task: object) -> nn.Module | None:
    """The task's own teacher, in evaluation mode and without gradients.

    Returns:
        None where the float model is to teach.

    Raises:
        UserError: it cannot be built, or is no module.
    """
    own = getattr(task, "build_teacher", None)
    if own is None:
        return None
    with _told_as("build_teacher()"):
        teacher = own()
    if teacher is None:
        return None
    module = _in_memory(teacher, "build_teacher()", "a module or None")
    return module.eval().requires_grad_(False)


def num_samples(task: object, batch: Any) -> int:
    """Training samples in a batch: the task's own count, else its first tensor's length."""
    own = getattr(task, "num_samples", None)
    if own is not None:
        return int(own(batch))
    first = next(_tensors(batch), None)
    if first is None or first.ndim == 0:
        raise UserError(
            f"task {type(task).__name__} needs num_samples(batch): its batches hold no tensor"
        )
    return int(first.shape[0])


def to_device(task: object, batch: Any, device: torch.device | str) -> Any:
    """The batch on `device`: by the task's own method, else every tensor in nested containers."""
    own = getattr(task, "to_device", None)
    return own(batch, device) if own is not None else move(batch, device)


def evaluate(task: Task, model: nn.Module, split: str) -> dict[str, float]:
    """The task's figures of a split; evaluation mode is set here, whatever the task does."""
    with evaluating(model):
        return {name: float(value) for name, value in task.evaluate(model, split).items()}


def load_data(task: object) -> None:
    """Let the task read its data now, where it knows how to.

    Raises:
        UserError: something wrong that the task names, or a file that may not be read.
    """
    own = getattr(task, "load_data", None)
    if own is not None:
        try:
            own()
        except PermissionError as error:
            raise UserError(unreadable(error)) from error


def unreadable(error: PermissionError) -> str:
    """What is to be said of a file or folder that this user may not read."""
    return f"{error.filename or error}: cannot be read: permission denied"


def input_bits(task: object) -> int | None:
    """Bit-width of the model's raw input, or None where it is quantized like any activation."""
    bits: int | None = getattr(task, "input_bits", None)
    return bits


def dataset(task: object) -> dict[str, Any]:
    """Name, sizes of the splits and digest of the data; what the task does not tell is empty."""
    own = getattr(task, "dataset", None)
    known: Mapping[str, Any] = own() if own is not None else {}
    return {"name": type(task).__name__, "splits": {}, "digest": None, **known}


def named_split(splits: Mapping[str, Part], name: str) -> Part:
    """One of a task's splits; `UserError` for an unknown name."""
    if name not in splits:
        raise UserError(f"no split named '{name}'{nearest(name, splits)}")
    return splits[name]


def check_batch_size(size: int) -> None:
    """Raise `UserError` for a batch without samples."""
    if size < 1:
        raise UserError(f"batch_size {size} is not positive")


def move(batch: Any, device: torch.device | str) -> Any:
    """Copy of nested tuples, lists and mappings whose tensors lie on `device`."""
    return _mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def take(task: object, batch: Any, part: slice) -> Any:
    """Some samples of a batch: by the task's own method, else those rows of its tensors.

    Raises:
        UserError: the task has no method, and its batches are no tensors with a row a sample.
    """
    own = getattr(task, "take", None)
    if own is not None:
        return own(batch, part)
    first = next(_tensors(batch), None)
    if first is None or first.ndim == 0 or len(first) != num_samples(task, batch):
        raise UserError(
            f"task {type(task).__name__}: its batches are no tensors with a row for each sample, "
            "so several processes cannot share them; give it take(batch, part), or each trial one "
            "process (resources.workers, resources.gpus)"
        )
    return _mapped(batch, lambda t: t[part] if t.ndim and len(t) == len(first) else t)


def _mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Copy of nested tuples, lists and mappings with other tensors."""
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
    """Every tensor in nested tuples, lists and mappings, first to last."""
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
    """Evaluation mode without gradients; afterwards every module has its former mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
