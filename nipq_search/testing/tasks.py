"""Conformance suite for tasks."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from nipq_search.errors import UserError
from nipq_search.quant.tracing.flow import tensors_in
from nipq_search.quant.tracing.trace import as_arguments
from nipq_search.tasks import TASKS, Task, base, check_task, make_task
from nipq_search.tasks.common.sections import flat_parameters
from nipq_search.train.forward import SharedForward

NAME = "task under test"
"""Name under which the suite registers the task."""

_INSTANCES: dict[type, tuple[dict[str, Any], Any]] = {}
"""Arguments and instance by test class, so that the data are loaded only once per class."""


def first_batches(
    task: Any, split: str, seed: int | None, count: int = 2, batch_size: int = 32
) -> list[Any]:
    """Return the first batches of a split.

    Args:
        task: the task.
        split: name of the split.
        seed: seed of the order of the samples, or None.
        count: maximum number of batches.
        batch_size: number of samples in a batch.

    Returns:
        The batches; fewer than `count` if the split is smaller.
    """
    return list(itertools.islice(iter(task.loader(split, batch_size, seed)), count))


def first_batch(task: Any) -> Any:
    """Return the first training batch on the CPU."""
    return base.to_device(task, first_batches(task, "train", 0)[0], "cpu")


def equal(left: Any, right: Any) -> bool:
    """Return whether two nested batches contain equal tensors in the same order.

    An assertion fails if one of them contains no tensors.
    """
    one, other = list(tensors_in(left)), list(tensors_in(right))
    assert one and other, "a batch contains no tensors"
    return len(one) == len(other) and all(map(torch.equal, one, other))


def keys(task: Any, split: str) -> set[Any]:
    """Return keys that identify the samples of a split.

    These are the task's `sample_keys`, or else the bytes of each sample in a batch's first tensor.
    """
    own = getattr(task, "sample_keys", None)
    if own is not None:
        return set(own(split))
    batches = task.loader(split, 500, None)
    return {row.numpy().tobytes() for batch in batches for row in next(tensors_in(batch))}


class TaskConformance:
    """Properties of every task.

    Attributes:
        task: the class under test, or a function that builds a task.
    """

    task: ClassVar[Callable[..., Task]]

    def task_args(self, folder: Path) -> dict[str, Any]:
        """Return the arguments of a small instance of the task.

        Override this method if the task has required arguments or needs data files.

        Args:
            folder: empty folder for data files.
        """
        return {}

    def make(self, arguments: dict[str, Any]) -> Any:
        """Build the task in the same way as a sweep does."""
        with TASKS.temporarily(NAME, type(self).task):
            return make_task(NAME, arguments)

    @pytest.fixture
    def arguments(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        """Return the arguments of `instance`."""
        return self._instance(tmp_path_factory)[0]

    @pytest.fixture
    def instance(self, tmp_path_factory: pytest.TempPathFactory) -> Any:
        """Return a task whose data are loaded; all tests of the class share this instance."""
        return self._instance(tmp_path_factory)[1]

    def _instance(self, factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
        if type(self) not in _INSTANCES:
            arguments = self.task_args(factory.mktemp("task"))
            task = self.make(arguments)
            base.load_data(task)
            _INSTANCES[type(self)] = (arguments, task)
        return _INSTANCES[type(self)]

    def test_relative_paths_are_the_same_in_other_processes(
        self, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Workers, which unpickle the task in a different working directory, read the same files.

        Args:
            arguments: the task's arguments, with absolute paths.
            tmp_path: the other working directory.
            monkeypatch: changes the working directory.
        """

        def relative(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: relative(entry) for key, entry in value.items()}
            return value.removeprefix(f"{folder}/") if isinstance(value, str) else value

        paths = [value for value in arguments.values() if str(value).startswith("/")]
        folder = Path(paths[0]).parent if paths else tmp_path
        while not all(str(path).startswith(f"{folder}/") for path in paths):
            folder = folder.parent
        monkeypatch.chdir(folder)
        here = self.make(relative(arguments))
        base.load_data(here)
        monkeypatch.chdir(tmp_path)
        there = pickle.loads(pickle.dumps(here))
        there.build_model()
        assert equal(first_batches(here, "train", 0), first_batches(there, "train", 0))

    def test_has_the_members_of_a_task(self, instance: Any) -> None:
        """The task has every required member, and its input width is 8 bits or unspecified."""
        check_task(instance)
        assert isinstance(instance, base.Task)
        assert base.input_bits(instance) in (None, 8)

    def test_equal_seeds_give_equal_batches(self, instance: Any) -> None:
        """The seed alone determines the order of the training split."""
        one, again = (first_batches(instance, "train", 3) for _ in range(2))
        assert equal(one, again)
        assert not equal(one, first_batches(instance, "train", 4))

    def test_one_loader_can_be_iterated_twice(self, instance: Any) -> None:
        """Iterating a loader again starts from its first batch."""
        loader = instance.loader("train", 32, 3)
        assert equal([next(iter(loader))], [next(iter(loader))])

    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_other_splits_keep_their_order(self, instance: Any, split: str) -> None:
        """The order of the validation and test splits does not depend on the seed."""
        assert equal(first_batches(instance, split, 1), first_batches(instance, split, 2))

    def test_loader_leaves_the_global_rng_alone(self, instance: Any) -> None:
        """Loading data does not draw from torch's global generator."""
        before = torch.get_rng_state()
        first_batches(instance, "train", 3)
        assert torch.equal(before, torch.get_rng_state())

    def test_an_epoch_visits_every_sample_once(self, instance: Any) -> None:
        """The batches of an epoch contain as many samples as the split."""
        for split, size in base.dataset(instance)["splits"].items():
            counts = [
                base.num_samples(instance, batch) for batch in instance.loader(split, 1000, 0)
            ]
            assert sum(counts) == size

    def test_unknown_split_is_named(self, instance: Any) -> None:
        """An unknown split raises `UserError`, and the message contains its name."""
        with pytest.raises(UserError, match="'nope'"):
            list(instance.loader("nope", 32, 0))

    def test_loss_is_finite_and_reaches_every_parameter(self, instance: Any) -> None:
        """The loss is a finite scalar with a gradient for every parameter."""
        model = instance.build_model()
        loss = instance.loss(model, first_batch(instance))
        assert loss.ndim == 0 and math.isfinite(loss.item())
        loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []

    def test_example_inputs_fit_the_model(self, instance: Any) -> None:
        """The model accepts the example inputs, which form a batch of one sample."""
        model = instance.build_model().eval()
        inputs = instance.example_inputs()
        assert isinstance(inputs, tuple | dict)
        assert {len(tensor) for tensor in tensors_in(inputs)} == {1}, "not a batch of one"
        positional, keywords = as_arguments(inputs)
        outputs = list(tensors_in(model(*positional, **keywords)))
        assert outputs and all(torch.isfinite(output).all() for output in outputs)

    def test_distillation_reaches_the_model_alone(self, instance: Any) -> None:
        """The gradients of the distillation loss reach the model but not the teacher.

        If the task has no distillation loss, the error message names the setting to change.
        """
        model, teacher = instance.build_model(), instance.build_model().eval()
        batch = first_batch(instance)
        if not base.has_distillation(instance):
            with pytest.raises(UserError, match="set train.distill to false"):
                base.distill_loss(instance, model, teacher, batch)
            return
        base.distill_loss(instance, model, teacher, batch).backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None for p in model.parameters())
        assert all(p.grad is None for p in teacher.parameters())

    def test_loss_and_distillation_share_a_forward(self, instance: Any) -> None:
        """The loss and the distillation loss use one forward pass, hence one draw of noise."""
        if not base.has_distillation(instance):
            return
        model, teacher = instance.build_model(), instance.build_model().eval()
        calls: list[None] = []
        model.register_forward_hook(lambda *given: calls.append(None))
        shared: Any = SharedForward(model)
        batch = first_batch(instance)
        instance.loss(shared, batch)
        base.distill_loss(instance, shared, teacher, batch)
        assert len(calls) == 1

    def test_evaluate_has_the_metric_and_restores_the_modes(self, instance: Any) -> None:
        """Evaluation returns finite metrics and leaves the modules' modes and state unchanged.

        The metrics include the task's metric, and repeating the evaluation gives equal metrics.
        """
        model = instance.build_model()
        leaves = [module for module in model.modules() if not list(module.children())]
        norms = [leaf for leaf in leaves if isinstance(leaf, torch.nn.BatchNorm2d)]
        frozen = (norms or leaves)[0]
        frozen.eval()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        figures = instance.evaluate(model, "validation")
        assert instance.metric[0] in figures
        assert all(isinstance(value, float) and math.isfinite(value) for value in figures.values())
        assert model.training and not frozen.training
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert figures == instance.evaluate(model, "validation")

    def test_data_are_described_in_json(self, instance: Any) -> None:
        """The description of the data is plain JSON with a digest and the size of every split."""
        described = base.dataset(instance)
        assert json.loads(json.dumps(described)) == described
        assert set(described["splits"]) == set(base.SPLITS)
        assert described["digest"]

    def test_read_only_copies_work_alike(self, instance: Any) -> None:
        """A copy with read-only arrays, such as those that Ray shares, gives equal batches."""
        copy = read_only_copy(instance)
        assert equal(first_batches(copy, "train", 5), first_batches(instance, "train", 5))
        assert base.dataset(copy) == base.dataset(instance)

    def test_splits_are_disjoint_and_fixed_by_the_seed(
        self, arguments: dict[str, Any], instance: Any
    ) -> None:
        """Splits barely overlap and depend only on the arguments, including `split_seed`."""
        # Published data sets contain a few duplicates, so a small overlap is allowed.
        samples = [keys(instance, name) for name in base.SPLITS]
        for one, other in itertools.combinations(samples, 2):
            assert len(one & other) < 0.01 * min(len(one), len(other))
        digest = base.dataset(instance)["digest"]
        assert base.dataset(self.make(arguments))["digest"] == digest
        if "split_seed" in flat_parameters(type(self).task):
            assert base.dataset(self.make({**arguments, "split_seed": 1}))["digest"] != digest


def read_only_copy(task: Any) -> Any:
    """Return a copy of a task whose arrays are read-only views of pickled buffers."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(task, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[memoryview(b.raw().tobytes()) for b in buffers])
