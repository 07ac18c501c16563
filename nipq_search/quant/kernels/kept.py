"""Tensors saved for the backward pass, and recomputation of quantized tensors to save memory.

Saving either a tensor or its quantized form is sufficient. If a quantizer saves its input, the
product that consumes the quantized form does not save that form as well; it is recomputed with the
same noise in the backward pass.
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
    """Tensor that a quantizer saves for the backward pass; the values are codes in the kernels."""

    INPUT = 0
    OUTPUT = 1


SMALL_ELEMENTS = 1 << 14
"""Quantized tensors with fewer elements are saved, since recomputing them would not pay off."""

_SAVE_THEIR_RESULT = frozenset({"SoftmaxBackward0"})
"""Names of autograd nodes that save the result of their operation."""


def is_retained(x: Tensor) -> bool:
    """Whether `x` stays in memory until the backward pass without being saved by the quantizer."""
    # A tensor without a `grad_fn` is a parameter or part of the batch, and stays alive anyway.
    return x.grad_fn is None or x.grad_fn.name() in _SAVE_THEIR_RESULT


def flattened(x: Tensor, kept_dims: int) -> Tensor:
    """Return `x`, or a contiguous copy if its leading dimensions cannot be flattened as a view.

    Without this, the product would make that copy itself and save it in addition to the tensor
    that the quantizer saves.

    Args:
        x: operand of a product.
        kept_dims: number of trailing dimensions that are not flattened.

    Returns:
        A tensor of the shape of `x`.
    """
    for i in range(x.dim() - kept_dims - 1):
        if x.stride(i) != x.stride(i + 1) * x.shape[i + 1]:
            return x.contiguous()
    return x


class Recipe:
    """Recomputes a quantized tensor, provided that its input was not modified in place."""

    def __init__(self, compute: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        """Store how to recompute a tensor.

        Args:
            compute: function that computed `y` from `x`.
            x: input of the quantizer.
            y: output of the quantizer.
        """
        self.compute, self.x = compute, x.detach()  # shares the version counter of `x`
        self.x_version, self.y_version = _version(x), _version(y)

    def unpack(self) -> Tensor:
        """Recompute the tensor.

        Raises:
            RuntimeError: the input was modified in place.
        """
        _check(self.x, self.x_version)
        return self.compute(self.x)


_recipes: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Recipes by quantized tensor. As attributes of the tensors, they would be serialized too."""


def register_recipe(y: Tensor, x: Tensor, compute: Callable[[Tensor], Tensor]) -> None:
    """Register how `y` can be recomputed from `x`; see `recompute_operands`.

    Args:
        y: output of a quantizer.
        x: input of the quantizer.
        compute: function that computed `y` from `x`.
    """
    _recipes[y] = Recipe(compute, x, y)


def _version(x: Tensor) -> int:
    """Return the version counter of `x`, which counts in-place writes; 0 for inference tensors."""
    return 0 if x.is_inference() else x._version


def _check(x: Tensor, version: int) -> None:
    """Check the version counter, as autograd does for the tensors that it saves."""
    if _version(x) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {x.type()} {list(x.shape)}, an operand of a quantized product, is at "
            f"version {_version(x)} instead of {version}"
        )


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@dataclasses.dataclass(frozen=True, slots=True)
class _Saved:
    """A tensor that is saved unchanged."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        """Return the tensor, provided that it was not modified in place."""
        _check(self.tensor, self.version)
        return self.tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Recomputed:
    """A tensor, or a view of one, that is recomputed in the backward pass."""

    recipe: Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def unpack(self) -> Tensor:
        """Recompute the tensor, and return the same view of it."""
        return self.recipe.unpack().as_strided(self.shape, self.stride, self.offset)


def has_other_hooks() -> bool:
    """Whether the compiler or other saved-tensor hooks, as in checkpointing, are active."""
    # Torch has no public function that returns the active hooks.
    return bool(
        torch.compiler.is_compiling()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


@contextlib.contextmanager
def recompute_operands(*operands: Tensor) -> Iterator[None]:
    """Within the context, products recompute operands in the backward pass where possible.

    Has no effect under torch.compile, or while other saved-tensor hooks are active, as in
    checkpointing, or hooks are disabled.

    Args:
        operands: the products' operands; only those with a registered recipe are recomputed.
    """
    # Torch has no public function that returns whether hooks are allowed.
    enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
    recipes = {}
    if not has_other_hooks() and enabled():
        for y in operands:
            recipe = _recipes.get(y)  # type: ignore[no-untyped-call]
            if recipe is not None and _version(y) == recipe.y_version:
                recipes[_storage(y)] = recipe
    if not recipes:
        yield
        return

    def pack(x: Tensor) -> _Saved | _Recomputed:
        """Return what is saved in place of `x`."""
        recipe = recipes.get(_storage(x)) if x.layout is torch.strided else None
        if recipe is None:
            return _Saved(x, _version(x))
        return _Recomputed(recipe, x.shape, x.stride(), int(x.storage_offset()))

    with saved_tensors_hooks(pack, lambda packed: packed.unpack()):
        yield
