"""Conformance tests of the task protocol, for every entry of the registry.

`sample_arguments` supplies the arguments of tasks that need some.
"""

from __future__ import annotations

import itertools
import json
import math
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sample_arguments import sample_arguments

from nipq_search.errors import UserError
from nipq_search.quant.tracing.trace import as_arguments, tensors_in
from nipq_search.tasks import TASKS, base, check_task, make_task
from nipq_search.tasks.common.sections import flat_parameters
from nipq_search.tasks.vision.array_classification import ArrayClassification
from nipq_search.train.forward import SharedForward


class Case(NamedTuple):
    """A registered name, and the arguments of a small instance."""

    name: str
    arguments: dict

    def make(self, **more):
        return make_task(self.name, {**self.arguments, **more})


@pytest.fixture(scope="module", params=sorted(TASKS))
def case(request, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp(request.param)
    return Case(request.param, sample_arguments(request.param, folder))


@pytest.fixture(scope="module")
def task(case):
    made = case.make()
    base.load_data(made)
    return made


def test_relative_paths_are_the_same_in_other_processes(case, tmp_path, monkeypatch):
    """Workers unpickle the task in a different working directory."""

    def relative(value):
        if isinstance(value, dict):
            return {key: relative(entry) for key, entry in value.items()}
        return value.removeprefix(f"{folder}/") if isinstance(value, str) else value

    paths = [value for value in case.arguments.values() if str(value).startswith("/")]
    folder = Path(paths[0]).parent if paths else tmp_path
    while not all(str(path).startswith(f"{folder}/") for path in paths):
        folder = folder.parent
    monkeypatch.chdir(folder)
    here = make_task(case.name, relative(case.arguments))
    base.load_data(here)
    monkeypatch.chdir(tmp_path)
    there = pickle.loads(pickle.dumps(here))
    there.build_model()
    assert equal(first_batches(here, "train", 0), first_batches(there, "train", 0))


def first_batches(task, split, seed, count=2, batch_size=32):
    batches = zip(range(count), task.loader(split, batch_size, seed), strict=False)
    return [batch for _, batch in batches]


def equal(left, right):
    """Whether two lists of batches contain equal tensors in the same order."""
    one, other = list(tensors_in(left)), list(tensors_in(right))
    assert one and other, "no tensor in the batches"
    return len(one) == len(other) and all(map(torch.equal, one, other))


def first_batch(task):
    return base.to_device(task, first_batches(task, "train", 0)[0], "cpu")


def keys(task, split):
    """Return values that identify the samples: the task's own keys, or each first tensor."""
    own = getattr(task, "sample_keys", None)
    if own is not None:
        return set(own(split))
    batches = task.loader(split, 500, None)
    return {row.numpy().tobytes() for batch in batches for row in next(tensors_in(batch))}


def test_has_the_members_of_a_task(task):
    check_task(task)
    assert isinstance(task, base.Task)
    assert base.input_bits(task) in (None, 8)


def test_equal_seeds_give_equal_batches(task):
    one, again = (first_batches(task, "train", 3) for _ in range(2))
    assert equal(one, again)
    assert not equal(one, first_batches(task, "train", 4))


def test_one_loader_can_be_iterated_twice(task):
    loader = task.loader("train", 32, 3)
    assert equal([next(iter(loader))], [next(iter(loader))])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_other_splits_keep_their_order(task, split):
    assert equal(first_batches(task, split, 1), first_batches(task, split, 2))


def test_loader_leaves_the_global_rng_alone(task):
    before = torch.get_rng_state()
    first_batches(task, "train", 3)
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_visits_every_sample_once(task):
    sizes = base.dataset(task)["splits"]
    for split, size in sizes.items():
        counts = [base.num_samples(task, batch) for batch in task.loader(split, 1000, 0)]
        assert sum(counts) == size


def test_unknown_split_is_named(task):
    with pytest.raises(UserError, match="no split named 'nope'"):
        list(task.loader("nope", 32, 0))


def test_loss_is_finite_and_reaches_every_parameter(task):
    model = task.build_model()
    loss = task.loss(model, first_batch(task))
    assert loss.ndim == 0 and math.isfinite(loss.item())
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_example_inputs_fit_the_model(task):
    model = task.build_model().eval()
    inputs = task.example_inputs()
    assert isinstance(inputs, tuple | dict)
    assert {len(tensor) for tensor in tensors_in(inputs)} == {1}, "a batch of one"
    positional, keywords = as_arguments(inputs)
    outputs = list(tensors_in(model(*positional, **keywords)))
    assert outputs and all(torch.isfinite(output).all() for output in outputs)


def test_distillation_reaches_the_model_alone(task):
    model, teacher = task.build_model(), task.build_model().eval()
    batch = first_batch(task)
    if not base.has_distillation(task):
        with pytest.raises(UserError, match="set train.distill to false"):
            base.distill_loss(task, model, teacher, batch)
        return
    base.distill_loss(task, model, teacher, batch).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_loss_and_distillation_share_a_forward(task):
    """Otherwise, each training step would run the model twice, with different noise."""
    if not base.has_distillation(task):
        return
    model, teacher, calls = task.build_model(), task.build_model().eval(), []
    model.register_forward_hook(lambda *given: calls.append(None))
    shared, batch = SharedForward(model), first_batch(task)
    task.loss(shared, batch)
    base.distill_loss(task, shared, teacher, batch)
    assert len(calls) == 1


def test_evaluate_has_the_metric_and_restores_the_modes(task):
    model = task.build_model()
    leaves = [module for module in model.modules() if not list(module.children())]
    norms = [leaf for leaf in leaves if isinstance(leaf, torch.nn.BatchNorm2d)]
    frozen = (norms or leaves)[0]
    frozen.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    figures = task.evaluate(model, "validation")
    assert task.metric[0] in figures
    assert all(isinstance(value, float) and math.isfinite(value) for value in figures.values())
    assert model.training and not frozen.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert figures == task.evaluate(model, "validation")


def test_data_are_described_in_json(task):
    described = base.dataset(task)
    assert json.loads(json.dumps(described)) == described
    assert set(described["splits"]) == set(base.SPLITS)
    assert described["digest"]


def test_read_only_copies_work_alike(task):
    """Ray passes pickled arrays as read-only views of shared memory."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(task, protocol=5, buffer_callback=buffers.append)
    views = [memoryview(buffer.raw().tobytes()) for buffer in buffers]
    copy = pickle.loads(data, buffers=views)
    if isinstance(task, ArrayClassification):
        assert not copy.split("train").images.flags.writeable
    assert equal(first_batches(copy, "train", 5), first_batches(task, "train", 5))
    assert base.dataset(copy) == base.dataset(task)


def test_splits_are_disjoint_and_fixed_by_the_seed(case, task):
    # Published data sets contain a few identical images, so a small overlap is acceptable.
    seen = [keys(task, name) for name in base.SPLITS]
    for one, other in itertools.combinations(seen, 2):
        assert len(one & other) < 0.01 * min(len(one), len(other))
    digest = base.dataset(task)["digest"]
    assert base.dataset(case.make())["digest"] == digest
    if "split_seed" in flat_parameters(TASKS[case.name]):
        assert base.dataset(case.make(split_seed=1))["digest"] != digest


def test_images_of_a_split_have_the_classes_in_proportion(task):
    if not isinstance(task, ArrayClassification):
        return
    for name in base.SPLITS:
        counts = np.bincount(task.split(name).labels, minlength=10)
        assert counts.min() > 0.85 * counts.max()
