"""Data flow of a forward pass: which inputs, parameters, layers and sums values come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nipq_search.quant.tracing.flops import register_formulas

INPUT = "input"
PARAMETER = "parameter:"
LAYER = "layer:"
SUM = "sum:"
"""Origins of values: the model's inputs, and prefixes of parameter, layer and sum names."""

Origins = frozenset[str]
"""Origins of the values of a tensor."""

_MOVES = {
    getattr(torch.ops.aten, name)
    for name in (
        "cat", "clone", "constant_pad_nd", "flip", "im2col", "index_select", "pixel_unshuffle",
        "reflection_pad2d", "replication_pad2d", "roll", "_to_copy",
    )
}  # fmt: skip
"""Operations that only move, copy or convert the values of their operands, or insert constants."""

TensorKey = tuple[int, int, int, int, tuple[tuple[int, int], ...]]
"""Identity of a tensor's values: storage, offset, version, number of elements, and the strides of
a tensor with gaps. Reshaped and permuted views have the same key."""


def tensor_key(x: Tensor) -> TensorKey:
    """Return the identity of the values of `x`; valid while a `Flow` is active."""
    axes = tuple(sorted((t, s) for s, t in zip(x.shape, x.stride(), strict=True) if s > 1))
    dense = 1 + sum((size - 1) * stride for stride, size in axes) == x.numel()
    storage = x.untyped_storage()._cdata  # address of the storage object, which identifies it
    version = 0 if x.is_inference() else x._version
    return (storage, int(x.storage_offset()), version, x.numel(), () if dense else axes)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


register_formulas()


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the origins of values through every operation, by storage, and counts FLOPs.

    The FLOP formulas are those of `FlopCounterMode`, whose module tracker cannot be used here: it
    rejects parameters that are passed to modules while gradients are disabled.

    The origins of a result are those of its operands, until `set` replaces them with a closer
    origin, such as the layer that computed the result. In-place writes add the origins of the
    written values.
    """

    def __init__(self) -> None:
        """Start without any origins."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self._origins: dict[int, Origins] = {}
        self._raw: set[int] = set()
        # A weak reference prevents the address from being reused by another storage.
        self._storages: dict[int, Any] = {}

    def set(self, x: Tensor, origins: Origins) -> None:
        """Set the origins of the values of `x`."""
        storage = x.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._origins[storage._cdata] = origins

    def of(self, x: Tensor) -> Origins:
        """Return the origins of the values of `x`; empty for constants."""
        return self._origins.get(x.untyped_storage()._cdata, frozenset())

    def set_raw(self, x: Tensor) -> None:
        """Mark `x` as an input of the model."""
        self.set(x, frozenset({INPUT}))
        self._raw.add(x.untyped_storage()._cdata)

    def is_raw(self, x: Tensor) -> bool:
        """Whether `x` contains only values of the model's inputs, possibly moved or padded."""
        return x.untyped_storage()._cdata in self._raw

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, record the origins of its results and count its FLOPs."""
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket)
        if formula is None:
            with self:  # some composite operations reach this mode undecomposed
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        given = [x for x in (*tensors_in(args), *tensors_in(kwargs)) if _has_storage(x)]
        sources = frozenset[str]().union(*map(self.of, given))
        moves = func.overloadpacket in _MOVES and bool(given) and all(map(self.is_raw, given))
        for x in tensors_in(out):
            if _has_storage(x):
                self.set(x, self.of(x) | sources)
                if moves:
                    self._raw.add(x.untyped_storage()._cdata)
                elif func._schema.is_mutable:  # the operation wrote to an operand
                    self._raw.discard(x.untyped_storage()._cdata)
        return out


def _has_storage(x: Tensor) -> bool:
    return x.layout is torch.strided
