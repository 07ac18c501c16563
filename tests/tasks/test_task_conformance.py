"""What every registered task must do; a new entry of the registry is tested by being there."""

from __future__ import annotations

import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch

from nipq_search.errors import UserError
from nipq_search.tasks import TASKS, base, check_task, make_task
from nipq_search.tasks.classification import ArrayClassification


@pytest.fixture(scope="module", params=sorted(TASKS))
def task(request):
    made = make_task(request.param)
    base.load_data(made)
    return made


def first_batches(task, split, seed, count=2, batch_size=32):
    batches = zip(range(count), task.loader(split, batch_size, seed), strict=False)
    return [batch for _, batch in batches]


def equal(left, right):
    return all(
        torch.equal(a, b)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    )


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
    batch = base.to_device(task, first_batches(task, "train", 0)[0], "cpu")
    loss = task.loss(model, batch)
    assert loss.ndim == 0 and math.isfinite(loss.item())
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_example_inputs_fit_the_model(task):
    model = task.build_model().eval()
    inputs = task.example_inputs()
    assert isinstance(inputs, tuple)
    assert torch.isfinite(model(*inputs)).all()


def test_distillation_reaches_the_model_alone(task):
    model, teacher = task.build_model(), task.build_model().eval()
    batch = first_batches(task, "train", 0)[0]
    if not base.has_distillation(task):
        with pytest.raises(UserError, match="set train.distill to false"):
            base.distill_loss(task, model, teacher, batch)
        return
    base.distill_loss(task, model, teacher, batch).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_evaluate_has_the_metric_and_restores_the_modes(task):
    model = task.build_model()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
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
    """Ray hands pickled arrays over as read-only views of shared memory."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(task, protocol=5, buffer_callback=buffers.append)
    views = [memoryview(buffer.raw().tobytes()) for buffer in buffers]
    copy = pickle.loads(data, buffers=views)
    if isinstance(task, ArrayClassification):
        assert not copy.split("train").images.flags.writeable
    assert equal(first_batches(copy, "train", 5), first_batches(task, "train", 5))
    assert base.dataset(copy) == base.dataset(task)


def test_splits_are_disjoint_and_fixed_by_the_seed(task):
    assert isinstance(task, ArrayClassification), "say here how another task shows its splits"
    # Published data hold a few identical images, so a trace of overlap is theirs.
    seen = [{image.tobytes() for image in task.split(name).images} for name in base.SPLITS]
    for one, other in itertools.combinations(seen, 2):
        assert len(one & other) < 0.01 * min(len(one), len(other))
    again = make_task(task.name)
    assert again.dataset()["digest"] == task.dataset()["digest"]
    other = make_task(task.name, {"split_seed": 1})
    assert other.dataset()["digest"] != task.dataset()["digest"]
    labels = [np.bincount(task.split(name).labels, minlength=10) for name in base.SPLITS]
    for counts in labels:
        assert counts.min() > 0.85 * counts.max()
