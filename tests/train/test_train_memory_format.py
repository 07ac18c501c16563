"""The channels-last format: applied only if the model's code supports it."""

from __future__ import annotations

import torch
from torch import nn

from nipq_search.train.memory_format import use_channels_last

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Viewing(nn.Module):
    """A common style: `view` instead of `flatten`."""

    def __init__(self, only_in_training=False):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)
        self.only_in_training = only_in_training

    def forward(self, x):
        x = self.conv(x)
        if self.training or not self.only_in_training:
            return self.head(x.view(len(x), -1))
        return self.head(x.flatten(1))


def is_channels_last(model):
    return all(
        m.weight.is_contiguous(memory_format=torch.channels_last)
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    )


def test_a_compatible_model_is_converted():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5)
    ).eval()
    before, state = model(X), torch.get_rng_state()
    assert use_channels_last(model, (X,)) is model
    assert is_channels_last(model) and not model.training
    assert torch.equal(state, torch.get_rng_state())
    assert model[1].num_batches_tracked == 0
    torch.testing.assert_close(model(X), before)


class Reading(nn.Module):
    """A model that reads a convolution's output in a way that may depend on the memory layout."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.read = nn.Conv2d(3, 4, 3, padding=1), read

    def forward(self, x):
        return self.read(self.conv(x))


def as_complex(y):
    return torch.view_as_complex(y.unflatten(-1, (4, 2))).abs()


def last(y):
    """Raise an error in the default format, but run with channels last."""
    return y.permute(0, 2, 3, 1).view(-1, 4)


def in_memory(y):
    return torch.as_strided(y, (4, 8), (8, 1))


def test_incompatible_models_are_unchanged():
    reading = [Reading(as_complex), Reading(in_memory)]
    for model in (Viewing(), Viewing(only_in_training=True), *reading):
        assert not is_channels_last(use_channels_last(model, (X,)))
        model.train()(X).sum().backward()


def test_models_without_convolutions_and_broken_ones():
    plain = nn.Linear(3, 3)
    assert use_channels_last(plain, None) is plain
    # One sample is too few for training in any memory format.
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4))
    assert is_channels_last(use_channels_last(model, (X[:1],)))


def test_models_that_store_tensors():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.kept = model(X)
    use_channels_last(model, (X,))
    assert model(X).shape == (2, 4, 6, 6)


def broken(y):
    raise ValueError("as it always does")


def test_models_that_fail_are_unchanged():
    for read in (last, broken):
        assert not is_channels_last(use_channels_last(Reading(read), (X,)))
