"""What quantizers keep for the backward, and quantized tensors that nobody keeps.

Of a tensor and its quantized form one is enough: the product that multiplies with the quantized
form need not keep it where the quantizer keeps its input. For the backward it is computed again,
from the same noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Kept(enum.Enum):
    """What a quantizer's backward reads; the kernels have these numbers."""

    INPUT = 0
    OUTPUT = 1


SMALL = 1 << 14
"""Tensors of fewer elements are kept twice: computing one again would cost more than it saves."""

_KEEP_THEIR_RESULT = frozenset({"SoftmaxBackward0"})


def lives_on(x: Tensor) -> bool:
    """Whether autograd, the model or the data hold `x` until the backward in any case."""
    return x.grad_fn is None or x.grad_fn.name() in _KEEP_THEIR_RESULT


def flattened(x: Tensor, taken: int) -> Tensor:
    """`x`, copied if its dimensions before the last `taken` are not one in memory.

    Products would copy it then, and keep the copy beside what the quantizer keeps.
    """
    for i in range(x.dim() - taken - 1):
        if x.stride(i) != x.stride(i + 1) * x.shape[i + 1]:
            return x.contiguous()
    return x


def remember(y: Tensor, again: Callable[[], Tensor]) -> None:
    """Say how `y` can be computed again."""
    y._again = again  # type: ignore[attr-defined]


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@dataclasses.dataclass(frozen=True, slots=True)
class _Other:
    """A tensor that is kept as it is; autograd itself would look at its version too."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {self.tensor.type()} {list(self.tensor.shape)}, an operand "
                f"of a quantized product, is at version {self.tensor._version} instead of "
                f"{self.version}"
            )
        return self.tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Again:
    """A tensor, or a view of one, that can be computed again."""

    again: Callable[[], Tensor]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def unpack(self) -> Tensor:
        return self.again().as_strided(self.shape, self.stride, self.offset)


def watched() -> bool:
    """Whether a compiler, or hooks on saved tensors as a checkpoint's, follow the forward."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


@contextlib.contextmanager
def not_keeping(*operands: Any) -> Iterator[None]:
    """Within, products do not keep those operands that can be computed again.

    Other hooks on saved tensors, as in checkpoints, come first: then nothing changes.
    """
    recipes = {_storage(y): y._again for y in operands if hasattr(y, "_again")}
    enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
    if not recipes or watched() or not enabled():
        yield
        return

    def pack(x: Tensor) -> _Other | _Again:
        again = recipes.get(_storage(x)) if x.layout is torch.strided else None
        if again is None:
            return _Other(x, x._version)
        return _Again(again, x.shape, x.stride(), int(x.storage_offset()))

    with saved_tensors_hooks(pack, lambda kept: kept.unpack()):
        yield
