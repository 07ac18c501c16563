"""Functions that multiply two tensors, and the positions of their operands.

To quantize another function, add a line to `OPS`, or add to `DECOMPOSED` an equivalent that is
written in terms of functions in `OPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from nipq_search.quant.tracing.attention import (
    attention,
    attention_scores,
    attention_values,
    multi_head_attention,
)


@dataclass(frozen=True)
class OperandSpec:
    """Position of an operand among the arguments of a function.

    Attributes:
        position: index among the positional arguments.
        keyword: name of the argument.
        axis: dimension of the output channels if the operand is a weight; None if no single
            dimension contains them.
        kept_dims: number of trailing dimensions that the function keeps when it flattens all
            leading ones into one; None if it does not flatten.
    """

    position: int
    keyword: str
    axis: int | None
    kept_dims: int | None = None

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the operand of a call, or None if it was not passed."""
        return args[self.position] if self.position < len(args) else kwargs.get(self.keyword)

    def replaced(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with the operand replaced.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            value: the new operand.

        Returns:
            New positional and keyword arguments.
        """
        if self.position < len(args):
            return (*args[: self.position], value, *args[self.position + 1 :]), dict(kwargs)
        return args, {**kwargs, self.keyword: value}


@dataclass(frozen=True)
class Op:
    """A function of two operands.

    Attributes:
        kind: kind of layer that a call becomes.
        first: first operand; None for a lookup of rows in a weight.
        second: second operand.
    """

    kind: str
    first: OperandSpec | None
    second: OperandSpec

    @property
    def is_sum(self) -> bool:
        """Whether the function adds. Sums have no BOPs, but both terms may be quantized."""
        return self.kind == "add"

    @property
    def is_lookup(self) -> bool:
        """Whether the function reads rows of a weight without multiplying."""
        return self.first is None

    @property
    def reads_rows(self) -> bool:
        """Whether the result consists of rows of the weight, so only these rows are quantized."""
        return self.kind == "embedding"


def _op(
    kind: str,
    first: int,
    name: str,
    second: int,
    other: str,
    axes: tuple[Any, Any],
    kept_dims: int | None = None,
) -> Op:
    return Op(
        kind,
        OperandSpec(first, name, axes[0], kept_dims),
        OperandSpec(second, other, axes[1], kept_dims),
    )


_MATMUL = (-2, -1)
_tensor: Any = torch.Tensor
_torch: Any = torch

OPS: dict[Any, Op] = {
    nnf.linear: _op("linear", 0, "input", 1, "weight", (None, 0), 1),
    nnf.embedding: Op("embedding", None, OperandSpec(1, "weight", 0)),
    nnf.embedding_bag: Op("embedding_bag", None, OperandSpec(1, "weight", 0)),
    attention_scores: _op("scores", 0, "query", 1, "key", (None, None), 2),
    attention_values: _op("values", 0, "probabilities", 1, "value", (None, None), 2),
    _torch.addmm: _op("addmm", 1, "mat1", 2, "mat2", _MATMUL),
    _tensor.addmm: _op("addmm", 1, "mat1", 2, "mat2", _MATMUL),
    _torch.baddbmm: _op("baddbmm", 1, "batch1", 2, "batch2", _MATMUL),
    _tensor.baddbmm: _op("baddbmm", 1, "batch1", 2, "batch2", _MATMUL),
    _torch.einsum: _op("einsum", 1, "", 2, "", (None, None)),
    _torch.tensordot: _op("tensordot", 0, "a", 1, "b", (None, None)),
    _tensor.__rmatmul__: _op("matmul", 1, "other", 0, "self", _MATMUL, 2),
}
"""Supported functions, keyed by the callable that torch function modes receive."""

for _name, _other in (
    ("matmul", "other"),
    ("mm", "mat2"),
    ("bmm", "mat2"),
    ("mv", "vec"),
    ("dot", "tensor"),
):
    for _owner in (_torch, _tensor):
        OPS[getattr(_owner, _name)] = _op("matmul", 0, "input", 1, _other, _MATMUL, 2)
OPS[_tensor.__matmul__] = OPS[_tensor.matmul]
for _n in (1, 2, 3):
    OPS[getattr(_torch, f"conv{_n}d")] = _op(f"conv{_n}d", 0, "input", 1, "weight", (None, 0))
    OPS[getattr(_torch, f"conv_transpose{_n}d")] = _op(
        f"conv_transpose{_n}d", 0, "input", 1, "weight", (None, 1)
    )
if hasattr(_torch, "_grouped_mm"):  # called by `F.grouped_mm`; all experts share the scales
    OPS[_torch._grouped_mm] = _op("grouped_mm", 0, "input", 1, "mat2", _MATMUL)
for _function in (_torch.add, *(getattr(_tensor, n) for n in ("add", "__add__", "__radd__"))):
    OPS[_function] = _op("add", 0, "input", 1, "other", (None, None))

IN_PLACE: frozenset[Any] = frozenset({_tensor.add_, _tensor.__iadd__})
"""Sums that overwrite their first operand."""

for _function in IN_PLACE:
    OPS[_function] = _op("add", 0, "input", 1, "other", (None, None))


def op_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Op | None:
    """Return the entry of `OPS` for a call, or None if the call is not supported.

    An einsum is supported only with two operands, passed as separate arguments, and a sum only if
    both terms are tensors.

    Args:
        func: the called function.
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        The entry of `OPS`, or None.
    """
    op = OPS.get(func)
    if op is None or (op.kind == "einsum" and (len(args) != 3 or not _tensors(args[1:]))):
        return None
    if op.is_sum and not (
        op.first and _tensors([op.first.of(args, kwargs), op.second.of(args, kwargs)])
    ):
        return None
    return op


def _tensors(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


DECOMPOSED: dict[Any, Callable[..., Any]] = {
    nnf.scaled_dot_product_attention: attention,
    nnf.multi_head_attention_forward: multi_head_attention,
}
"""Equivalents of fused functions, written in terms of functions in `OPS`, by fused function."""

DECOMPOSED_KINDS = frozenset({"linear", "scores", "values"})
"""Kinds of the functions in `OPS` that the equivalents in `DECOMPOSED` call."""
