"""The functions that multiply two tensors, and where their operands stand.

To quantize another function add a line to `OPS`, or to `DECOMPOSED` a function that is written
with those.
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
class Operand:
    """Where a function takes an operand.

    Attributes:
        position: index among the positional arguments.
        keyword: its name.
        axis: dimension of the output channels where the operand is a weight; None where there
            is no single one.
        taken: last dimensions that the function takes as they are; it makes one of those before.
            None where it does not.
    """

    position: int
    keyword: str
    axis: int | None
    taken: int | None = None

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The operand in a call, or None."""
        return args[self.position] if self.position < len(args) else kwargs.get(self.keyword)

    def replaced(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with `value` in the operand's place."""
        if self.position < len(args):
            return (*args[: self.position], value, *args[self.position + 1 :]), dict(kwargs)
        return args, {**kwargs, self.keyword: value}


@dataclass(frozen=True)
class Op:
    """A function of two operands; `first` is missing where only a weight is looked up."""

    kind: str
    first: Operand | None
    second: Operand

    @property
    def is_sum(self) -> bool:
        """Whether it adds, which is no work in BOPs but keeps two tensors."""
        return self.kind == "add"

    @property
    def is_lookup(self) -> bool:
        """Whether it reads rows of a weight and multiplies nothing."""
        return self.first is None

    @property
    def reads_rows(self) -> bool:
        """Whether its results are the rows themselves, so that these alone can be quantized."""
        return self.kind == "embedding"


def _op(
    kind: str,
    first: int,
    name: str,
    second: int,
    other: str,
    axes: tuple[Any, Any],
    taken: int | None = None,
) -> Op:
    operands = Operand(first, name, axes[0], taken), Operand(second, other, axes[1], taken)
    return Op(kind, *operands)


_MATMUL = (-2, -1)
_tensor: Any = torch.Tensor
_torch: Any = torch

OPS: dict[Any, Op] = {
    nnf.linear: _op("linear", 0, "input", 1, "weight", (None, 0), 1),
    nnf.embedding: Op("embedding", None, Operand(1, "weight", 0)),
    nnf.embedding_bag: Op("embedding_bag", None, Operand(1, "weight", 0)),
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
"""Functions by the object that is called."""

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
if hasattr(_torch, "_grouped_mm"):  # what `F.grouped_mm` calls; experts share the scales
    OPS[_torch._grouped_mm] = _op("grouped_mm", 0, "input", 1, "mat2", _MATMUL)
for _function in (_torch.add, *(getattr(_tensor, n) for n in ("add", "__add__", "__radd__"))):
    OPS[_function] = _op("add", 0, "input", 1, "other", (None, None))

IN_PLACE: frozenset[Any] = frozenset({_tensor.add_, _tensor.__iadd__})
"""Sums that overwrite their first operand."""

for _function in IN_PLACE:
    OPS[_function] = _op("add", 0, "input", 1, "other", (None, None))


def op_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Op | None:
    """How a call multiplies or adds, or None.

    An einsum of another number of operands has no quantized form; a sum with a number is none.
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
"""Fused functions, and how they are written with functions of `OPS`."""

PARTS = frozenset({"linear", "scores", "values"})
"""Kinds of the functions that they are written with."""
