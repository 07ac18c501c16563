"""Small models and a reference quantizer shared by the tests of the quantizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nipq_search.testing.models import WIDTHS, images, normal, plain_quantize, residual_net

__all__ = [
    "WIDTHS",
    "OneLayer",
    "distance",
    "images",
    "normal",
    "plain_quantize",
    "residual_cdf",
    "residual_net",
]


class OneLayer(nn.Module):
    """A linear layer after an activation function."""

    def __init__(self, before: nn.Module, features: int = 64) -> None:
        super().__init__()
        self.before = before
        self.linear = nn.Linear(features, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.before(x))


def distance(sample, cdf):
    """Return the Kolmogorov-Smirnov distance between a sample and a distribution."""
    ordered = sample.double().sort().values
    exact, n = cdf(ordered), len(ordered)
    above = (torch.arange(1, n + 1) / n - exact).abs().max()
    return max(float(above), float((exact - torch.arange(n) / n).abs().max()))


def residual_cdf(range_):
    """Return the exact CDF of `round(x / step) - x / step` inside the boundaries of `range_`.

    The input x is standard normal.
    """
    step, low, high = (float(v) for v in (range_.step, range_.low, range_.high))

    def cdf(t):
        total, norm = torch.zeros_like(t), 0.0
        for k in range(int(range_.lowest), int(range_.highest) + 1):
            left, right = max((k - 0.5) * step, low), min((k + 0.5) * step, high)
            start = ((k - t) * step).clamp(left, right)
            right = torch.tensor(right, dtype=torch.float64)
            total += torch.special.ndtr(right) - torch.special.ndtr(start)
            norm += float(
                torch.special.ndtr(right)
                - torch.special.ndtr(torch.tensor(left, dtype=torch.float64))
            )
        return total / norm

    return cdf
