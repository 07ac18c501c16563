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

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary


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


class Recipe:
    """How a quantized tensor can be computed again, as long as nobody overwrote anything."""

    def __init__(self, again: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        """Take the function that computed `y` from `x`."""
        self.again, self.x = again, x.detach()  # which shares the counter of versions
        self.x_version, self.y_version = _version(x), _version(y)

    def unpack(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: what it is computed from was overwritten.
        """
        _check(self.x, self.x_version)
        return self.again(self.x)


_recipes: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Of quantized tensors that live. No attribute of theirs: people save tensors."""


def remember(y: Tensor, x: Tensor, again: Callable[[Tensor], Tensor]) -> None:
    """Say how `y` can be computed again from `x`."""
    _recipes[y] = Recipe(again, x, y)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _check(x: Tensor, version: int) -> None:
    """Autograd itself looks at the version of what it saves."""
    if _version(x) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {x.type()} {list(x.shape)}, an operand of a quantized product, is at "
            f"version {_version(x)} instead of {version}"
        )


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@dataclasses.dataclass(frozen=True, slots=True)
class _Other:
    """A tensor that is kept as it is."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        _check(self.tensor, self.version)
        return self.tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Again:
    """A tensor, or a view of one, that can be computed again."""

    recipe: Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def unpack(self) -> Tensor:
        return self.recipe.unpack().as_strided(self.shape, self.stride, self.offset)


def watched() -> bool:
    """Whether a compiler, or hooks on saved tensors as a checkpoint's, follow the forward."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


@contextlib.contextmanager
def not_keeping(*operands: Tensor) -> Iterator[None]:
    """Within, products do not keep those operands that can be computed again.

    Other hooks on saved tensors, as in checkpoints, come first: then nothing changes.
    """
    enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
    recipes = {}
    if not watched() and enabled():
        for y in operands:
            recipe = _recipes.get(y)  # type: ignore[no-untyped-call]
            if recipe is not None and _version(y) == recipe.y_version:
                recipes[_storage(y)] = recipe
    if not recipes:
        yield
        return

    def pack(x: Tensor) -> _Other | _Again:
        recipe = recipes.get(_storage(x)) if x.layout is torch.strided else None
        if recipe is None:
            return _Other(x, _version(x))
        return _Again(recipe, x.shape, x.stride(), int(x.storage_offset()))

    with saved_tensors_hooks(pack, lambda kept: kept.unpack()):
        yield
