"""A task: two rings of points in the plane."""

from __future__ import annotations

import torch
from torch import nn

from nipq_search.tasks.base import evaluating, named_split

SIZES = {"train": 512, "validation": 128, "test": 128}


class Rings:
    """Classify points as part of an inner or an outer ring.

    Args:
        split_seed: seed of the points.
    """

    metric = ("accuracy", "max")

    def __init__(self, split_seed: int = 0):
        """Draw the points."""
        generator = torch.Generator().manual_seed(split_seed)
        total = sum(SIZES.values())
        labels = torch.arange(total) % 2
        angle = 2 * torch.pi * torch.rand(total, generator=generator)
        radius = 1 + labels + 0.2 * torch.randn(total, generator=generator)
        points = torch.stack([angle.cos(), angle.sin()], 1) * radius[:, None]
        parts = zip(
            points.split(list(SIZES.values())), labels.split(list(SIZES.values())), strict=True
        )
        self.data = dict(zip(SIZES, parts, strict=True))
        self.split_seed = split_seed

    def build_model(self):
        """Build a perceptron with two hidden layers."""
        return nn.Sequential(
            nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
        )

    def example_inputs(self):
        """Return one point."""
        return (self.data["train"][0][:1],)

    def loader(self, split, batch_size, seed):
        """Return the batches of an epoch; the training split is shuffled with the seed."""
        points, labels = named_split(self.data, split)
        order = torch.arange(len(points))
        if split == "train" and seed is not None:
            order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
        return [(points[part], labels[part]) for part in order.split(batch_size)]

    def loss(self, model, batch):
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, model, split):
        """Return the accuracy."""
        points, labels = named_split(self.data, split)
        with evaluating(model):
            return {"accuracy": (model(points).argmax(1) == labels).float().mean().item()}

    def dataset(self):
        """Describe the data."""
        return {"name": "rings", "splits": SIZES, "digest": f"rings {self.split_seed}"}
