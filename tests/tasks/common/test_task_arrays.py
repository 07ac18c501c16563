"""Splits, shifts and batches in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nipq_search.tasks.common.arrays import (
    Batches,
    Normalization,
    Split,
    digest_splits,
    shift_images,
    stratified,
)

PLAIN = Normalization(scale=1.0, mean=0.0, std=1.0)


def split_of(count):
    images = np.arange(count * 4, dtype=np.uint8).reshape(count, 1, 2, 2)
    images.flags.writeable = False
    return Split(images=images, labels=np.arange(count, dtype=np.int64))


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
)
def test_splits_are_disjoint_of_exact_size_and_stratified(seed, sizes):
    labels = np.repeat(np.arange(4), [10, 20, 30, 100])
    parts = stratified(labels, sizes, seed)
    assert [len(part) for part in parts] == sizes
    together = np.concatenate(parts)
    assert len(set(together.tolist())) == len(together)
    for part in parts:
        expected = np.bincount(labels) / len(labels) * len(part)
        assert np.abs(np.bincount(labels[part], minlength=4) - expected).max() <= 2


def test_the_split_of_a_seed_never_changes():
    labels = np.arange(20) % 2
    first, second = stratified(labels, [4, 4], 0)
    assert first.tolist() == [18, 1, 19, 8]
    assert second.tolist() == [10, 17, 6, 13]


def test_too_large_splits_are_refused():
    with pytest.raises(ValueError, match="6 samples from 5"):
        stratified(np.zeros(5), [3, 3], 0)


def test_last_partial_batch_is_kept():
    batches = Batches(split=split_of(10), normalization=PLAIN, batch_size=4, seed=0)
    got = list(batches)
    assert len(batches) == len(got) == 3
    assert [len(labels) for _, labels in got] == [4, 4, 2]
    assert sorted(torch.cat([labels for _, labels in got]).tolist()) == list(range(10))


def test_without_a_seed_nothing_moves():
    batches = Batches(split=split_of(3), normalization=PLAIN, batch_size=3, shift=2)
    images, labels = next(iter(batches))
    assert images.flatten().tolist() == list(range(12))
    assert labels.tolist() == [0, 1, 2]
    assert images.dtype == torch.float32 and labels.dtype == torch.int64


def test_shift_moves_whole_images():
    images = torch.zeros(200, 2, 7, 7, dtype=torch.uint8)
    images[:, 0, 3, 3], images[:, 1, 3, 3] = 1, 2
    moved = shift_images(images, 2, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert (moved.sum(dim=(2, 3)) == torch.tensor([1, 2])).all()
    assert torch.equal(moved[:, 0] * 2, moved[:, 1])
    places = moved[:, 0].flatten(1).argmax(dim=1)
    assert set(places.tolist()) == {r * 7 + c for r in range(1, 6) for c in range(1, 6)}


def test_normalization():
    raw = torch.tensor([0, 51, 255], dtype=torch.uint8)
    got = Normalization(scale=255.0, mean=0.2, std=0.4)(raw)
    assert torch.allclose(got, torch.tensor([-0.5, 0.0, 2.0]), atol=1e-6)


def test_digest_sees_every_array():
    one, other = split_of(5), split_of(6)
    digests = {
        digest_splits({"train": one}),
        digest_splits({"test": one}),
        digest_splits({"train": other}),
        digest_splits({"train": Split(images=one.images, labels=one.labels + 1)}),
    }
    assert len(digests) == 4
