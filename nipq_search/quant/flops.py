"""Formulas that torch's FLOP counter lacks, so that no multiplication goes uncounted.

They are registered with torch itself (`torch.utils.flop_counter.register_flop_formula`):
`FlopCounterMode` counts alike from then on. Formulas that torch has are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

Shape = torch.Size


def _grouped(first: Shape, second: Shape, *args: Any, **kwargs: Any) -> int:
    """Each row meets one group's matrix; where both are flat, each column one group's row."""
    if len(first) == 3 and len(second) == 3:
        return 2 * first[0] * first[1] * first[2] * second[-1]
    return 2 * first[-2] * first[-1] * second[-1]


def _vector(first: Shape, second: Shape, *args: Any, **kwargs: Any) -> int:
    """A matrix, or a vector, by a vector."""
    return 2 * first.numel()


def _added_vector(bias: Shape, first: Shape, second: Shape, *args: Any, **kwargs: Any) -> int:
    """A matrix by a vector, plus something."""
    return 2 * first.numel()


def _added_products(bias: Shape, first: Shape, second: Shape, *args: Any, **kwargs: Any) -> int:
    """A batch of matrix products, summed over the batch."""
    return 2 * first.numel() * second[-1]


def _trilinear(first: Shape, second: Shape, third: Shape, *args: Any, **kwargs: Any) -> int:
    """What `F.bilinear` computes: products of three tensors, broadcast and summed."""
    shapes = []
    for shape, new in zip((first, second, third), args, strict=False):
        sizes = list(shape)
        for dimension in sorted(new):
            sizes.insert(dimension, 1)
        shapes.append(sizes)
    whole: tuple[int, ...] = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return 2 * math.prod(whole)


def register_formulas() -> None:
    """Register what is missing; does nothing the second time."""
    formulas: dict[str, Callable[..., int]] = {
        "_grouped_mm": _grouped,
        "mv": _vector,
        "dot": _vector,
        "vdot": _vector,
        "addmv": _added_vector,
        "addbmm": _added_products,
        "_trilinear": _trilinear,
    }
    for name, formula in formulas.items():
        operation = getattr(torch.ops.aten, name, None)
        if operation is not None and operation not in flop_registry:
            register_flop_formula(operation)(formula)
