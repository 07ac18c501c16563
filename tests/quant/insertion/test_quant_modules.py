"""Modules with special properties: own pickling, tied weights, embeddings, other dtypes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from quant_models import normal
from torch import nn

import nipq_search as ns
from nipq_search.errors import UserError
from nipq_search.quant import QuantConfig, prepare, quantizers

X = normal(4, 8)


def test_normalization_that_does_not_run_in_evaluation_keeps_its_statistics():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.dead = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8)
            self.dead.running_mean.fill_(3.0)

        def forward(self, x):
            return self.norm(self.a(x))

    prepared = prepare(Auxiliary(), X)
    ns.reestimate_norm_stats(prepared, [X])
    assert prepared.norm.running_mean.abs().sum() > 0
    assert torch.equal(prepared.dead.running_mean, torch.full((8,), 3.0))


def test_inference_first_and_training_later():
    prepared = prepare(nn.Linear(8, 3), X)
    with torch.inference_mode():
        prepared(X)
    prepared(X).sum().backward()
    model = nn.Linear(8, 3)
    with torch.inference_mode():
        prepared = prepare(model, normal(4, 8))
        made_there = nn.Linear(8, 3)
    prepared(X).sum().backward()
    with pytest.raises(UserError, match="weight: created under torch.inference_mode"):
        prepare(made_there, X)


def test_mappings_of_any_kind_are_examples():
    import collections

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 3)

        def forward(self, values):
            return self.a(values)

    assert prepare(Named(), collections.UserDict(values=X))(values=X).shape == (4, 3)


def test_owners_with_state_of_their_own_are_copied():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.secret = nn.Parameter(normal(8, 8)), lambda: None

        def __getstate__(self):
            state = self.__dict__.copy()
            state["secret"] = None
            return state

        def forward(self, x):
            return x @ self.weight

    prepared = prepare(Locked(), X)
    assert copy.deepcopy(prepared).secret is None


def test_lsq_starts_at_the_width_of_its_group():
    y = normal(8, 64)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    grouped = prepare(model, y, QuantConfig(quantizer="lsq", pin={"1": 3}, groups=(("0", "1"),)))
    pinned = prepare(model, y, QuantConfig(quantizer="lsq", pin={"*": 3}))
    for name in quantizers(pinned):
        torch.testing.assert_close(
            quantizers(grouped)[name].alpha(), quantizers(pinned)[name].alpha()
        )


def test_ties_survive_loads_that_assign():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prepared = prepare(model, X, QuantConfig(groups=(("0", "1"),)))
    prepared.load_state_dict(copy.deepcopy(prepared.state_dict()), assign=True)
    found = quantizers(prepared)
    assert found["0.weight"].bits.theta is found["1.weight"].bits.theta


def test_expanded_parameters_are_stored_once():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Parameter(normal(4, 8))

        def forward(self, x):
            return self.q.expand(len(x), -1, -1) @ x.mT

    for batch in (1, 3):
        table = ns.profile(prepare(Queries(), normal(batch, 5, 8)))
        assert table["weight_bytes"].sum() == 32


def test_bags_of_embeddings_are_quantized():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(10, 8), nn.Linear(8, 2)

        def forward(self, ids):
            return self.head(self.bag(ids))

    prepared = prepare(Bag(), torch.arange(6).view(2, 3))
    assert "bag.weight" in quantizers(prepared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(torch.arange(6).view(2, 3)).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())


def test_wide_grids_of_a_model_in_bfloat16():
    config = QuantConfig(
        weights=ns.WeightConfig(bits=(12,), granularity=ns.quant.Granularity.PER_TENSOR)
    )
    model = nn.Linear(64, 300)
    prepared = prepare(model, normal(2, 64), config).bfloat16()
    quantizer = next(q for q in quantizers(prepared).values() if q.role == "weight")
    quantizer.eval()
    assert len(quantizer(torch.linspace(-1, 1, 60_001)).unique()) <= 4095


def test_what_an_embedding_gives_may_be_overwritten():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(10, 8), nn.Linear(8, 3)
            self.drop, self.relu = nn.Dropout(0.5, inplace=True), nn.ReLU(inplace=True)

        def forward(self, ids):
            x = self.words(ids)
            x += 1.0
            x *= 2.0
            return self.head(self.relu(self.drop(x)))

    prepared = prepare(Text(), torch.arange(8).view(2, 4))
    prepared(torch.arange(8).view(2, 4)).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())
