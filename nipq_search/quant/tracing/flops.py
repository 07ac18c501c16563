"""FLOP formulas that are missing from torch, so that every multiplication is counted.

The formulas are registered with `torch.utils.flop_counter.register_flop_formula`, so
`FlopCounterMode` uses them as well. Existing formulas are not replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

Shape = torch.Size


def _grouped(first: Shape, second: Shape, *args: Any, **kwargs: Any) -> int:
    """Grouped matrix product: each row is multiplied by the matrix of its group.

    If both operands are 2-D, each column of the first is multiplied by the same row of the second,
    and the products are summed within each group.
    """
    if len(first) == 3 and len(second) == 3:
        return 2 * first[0] * first[1] * first[2] * second[-1]
    return 2 * first[-2] * first[-1] * second[-1]


def _vector(first: Shape, second: Shape, *args: Any, **kwargs: Any) -> int:
    """Product of a matrix and a vector, or of two vectors."""
    return 2 * first.numel()


def _added_vector(bias: Shape, first: Shape, second: Shape, *args: Any, **kwargs: Any) -> int:
    """Product of a matrix and a vector, plus a bias."""
    return 2 * first.numel()


def _added_products(bias: Shape, first: Shape, second: Shape, *args: Any, **kwargs: Any) -> int:
    """Sum of a batch of matrix products."""
    return 2 * first.numel() * second[-1]


def _trilinear(first: Shape, second: Shape, third: Shape, *args: Any, **kwargs: Any) -> int:
    """Sum of the broadcast products of three tensors, as in `F.bilinear`."""
    shapes = []
    for shape, new in zip((first, second, third), args, strict=False):
        sizes = list(shape)
        for dimension in sorted(new):
            sizes.insert(dimension, 1)
        shapes.append(sizes)
    whole: tuple[int, ...] = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return 2 * math.prod(whole)


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Attention scores and their product with the values; shapes (B, heads, L, E)."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def _multi_head(
    query: Shape, key: Shape, value: Shape, width: int, *args: Any, **kwargs: Any
) -> int:
    """Attention with projections of queries, keys, values and output; shapes (B, L, E)."""
    batch, length, _ = query
    projections = batch * width * width * (2 * length + key[1] + value[1])
    return 2 * (projections + 2 * batch * length * key[1] * width)


def _encoder_layer(source: Shape, width: int, heads: int, *args: Any, **kwargs: Any) -> int:
    """Transformer encoder layer: attention and the two layers of the feed-forward block."""
    hidden = next(shape[0] for shape in args[8:] if isinstance(shape, Shape) and len(shape) == 2)
    batch, length, _ = source
    return _multi_head(source, source, source, width) + 4 * batch * length * width * hidden


def register_formulas() -> None:
    """Register the formulas of operations that have none; further calls have no effect."""
    formulas: dict[str, Callable[..., int]] = {
        "_grouped_mm": _grouped,
        "mv": _vector,
        "dot": _vector,
        "vdot": _vector,
        "addmv": _added_vector,
        "addbmm": _added_products,
        "_trilinear": _trilinear,
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_native_multi_head_attention": _multi_head,
        "_transformer_encoder_layer_fwd": _encoder_layer,
    }
    for name, formula in formulas.items():
        operation = getattr(torch.ops.aten, name, None)
        if operation is not None and operation not in flop_registry:
            register_flop_formula(operation)(formula)
