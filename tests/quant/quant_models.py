"""Small models and a reference quantizer shared by the tests of the quantizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nipq_search.quant.numerics.functional import Grid

WIDTHS = [(Grid.SIGNED, b) for b in range(2, 15)] + [
    (grid, b) for grid in (Grid.UNSIGNED, Grid.AFFINE) for b in range(1, 15)
]


class Residual(nn.Module):
    """A stem, a strided residual sum of two convolutions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.main = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.side = nn.Conv2d(4, 6, 1, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.silu(self.main(x) + self.side(x))
        return self.head(x.mean((2, 3)))


class OneLayer(nn.Module):
    """A linear layer after an activation function."""

    def __init__(self, before: nn.Module, features: int = 64) -> None:
        super().__init__()
        self.before = before
        self.linear = nn.Linear(features, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.before(x))


def residual_net(seed: int = 0) -> Residual:
    """Return a residual net with fixed weights, without changing the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Residual()


def images(seed: int = 0, batch: int = 4) -> Tensor:
    """Return random gray 8x8 images with values in [0, 1)."""
    return torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal numbers that are the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_quantize(x, alpha, bits, grid, minimum):
    """Quantize with the textbook formula, independently of the library: scale, clip, rescale."""
    if grid is Grid.SIGNED:
        least, most = -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
        step = alpha / most
    else:
        step = alpha / (2**bits - 1)
        zero = round(float(-minimum / step)) if grid is Grid.AFFINE else 0
        zero = min(max(zero, 0), 2**bits - 1)
        least, most = -zero, 2**bits - 1 - zero
    return (x / step).round().clamp(least, most) * step


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
