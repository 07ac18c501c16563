"""A small model, its inputs, and a textbook quantizer that the suites use as a reference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nipq_search.quant.numerics.functional import Grid

WIDTHS = [(Grid.SIGNED, bits) for bits in range(2, 15)] + [
    (grid, bits) for grid in (Grid.UNSIGNED, Grid.AFFINE) for bits in range(1, 15)
]
"""Pairs of grid and bit-width for which single precision represents all grid points exactly."""


class Residual(nn.Module):
    """A stem, a strided residual block with a projection, and a head."""

    def __init__(self) -> None:
        """Build the layers with random weights."""
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.main = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.side = nn.Conv2d(4, 6, 1, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (batch, 3) for images of shape (batch, 1, height, width)."""
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.silu(self.main(x) + self.side(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def residual_net(seed: int = 0) -> Residual:
    """Return a residual net with weights fixed by `seed`; the global generator is unchanged."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Residual()


def images(seed: int = 0, batch: int = 4) -> Tensor:
    """Return random grayscale images fixed by `seed`: values in [0, 1), shape (batch, 1, 8, 8)."""
    return torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal random numbers that are determined by `seed`.

    Args:
        shape: shape of the tensor.
        seed: seed of the generator.
        dtype: dtype of the tensor.

    Returns:
        A tensor of that shape.
    """
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_quantize(x: Tensor, alpha: Tensor, bits: int, grid: Grid, minimum: Tensor) -> Tensor:
    """Quantize as textbooks do: divide by the step, round, clip, multiply by the step.

    Written independently of the library's kernels.

    Args:
        x: the tensor.
        alpha: truncation boundary, broadcastable to `x`.
        bits: bit-width.
        grid: signed, unsigned or affine.
        minimum: lower end of an affine grid; ignored for other grids.

    Returns:
        The quantized tensor, with the shape of `x`.
    """
    if grid is Grid.SIGNED:
        least, most = -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
        step = alpha / most
    else:
        step = alpha / (2**bits - 1)
        zero = round(float(-minimum / step)) if grid is Grid.AFFINE else 0
        zero = min(max(zero, 0), 2**bits - 1)
        least, most = -zero, 2**bits - 1 - zero
    quantized: Tensor = (x / step).round().clamp(least, most) * step
    return quantized
