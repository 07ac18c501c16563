"""Multiplications that a module writes out itself, quantized without editing the module.

A *site* is the n-th call of one kind of function (see `ops.OPS`) in a module's forward:
`F.linear(x, self.qkv.weight)`, `q @ k.transpose(-2, -1)`, a convolution subclass with a forward of
its own. `prepare` finds the sites of a model in one traced forward and makes each module that has
some an *owner*. While an owner's forward runs, a torch function mode sees every call, and at a
site passes the operands through the site's quantizers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nipq_search.quant.noise import not_compiled
from nipq_search.quant.ops import DECOMPOSED, IN_PLACE, Op, op_of
from nipq_search.quant.quantizer import FakeQuantizer

SITES = "quant_sites"
"""Name of the submodule that an owner gets."""


class Site(nn.Module):
    """The quantizers of one call; an operand without one passes as it is."""

    def __init__(self, first: FakeQuantizer | None, second: FakeQuantizer | None) -> None:
        """Hold the quantizers of the first and of the second operand."""
        super().__init__()
        self.first, self.second = first, second

    def call(self, op: Op, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run `func` on quantized operands."""
        if op.is_lookup:
            return self._lookup(op, func, args, kwargs)
        if func in IN_PLACE:
            # The quantizer keeps its operand for the backward, so that must not be overwritten.
            target = args[0]
            args = (target.clone(), *args[1:])
            func = torch.add
        else:
            target = None
        for operand, quantizer in ((op.first, self.first), (op.second, self.second)):
            if operand is not None and quantizer is not None:
                value = quantizer(operand.of(args, kwargs), axis=operand.axis)
                args, kwargs = operand.replaced(args, kwargs, value)
        result = func(*args, **kwargs)
        return result if target is None else target.copy_(result)

    def _lookup(self, op: Op, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Quantize the rows that are read, not the whole table."""
        rows: Tensor = func(*args, **kwargs)
        if self.second is None:
            return rows
        index = args[0] if args else kwargs["input"]
        flat = self.second(rows.flatten(0, -2), rows=index.flatten())
        return flat.view_as(rows)


def site_key(kind: str, ordinal: int) -> str:
    """Name of a site within its owner."""
    return f"{kind}_{ordinal}"


class _Frame:
    """One running forward of an owner."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.sites = sites
        self.counts: dict[str, int] = {}

    def next(self, kind: str) -> Site | None:
        """The site of the call that comes now.

        Calls beyond those of the traced forward, as in a loop over a longer sequence, use the
        last site of their kind.
        """
        ordinal = self.counts.get(kind, 0)
        self.counts[kind] = ordinal + 1
        while ordinal >= 0:
            site = self.sites.get(site_key(kind, ordinal))
            if site is not None:
                return site
            ordinal -= 1
        return None


class _Running(threading.local):
    """Owners whose forwards run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []


_running = _Running()


class _SiteMode(TorchFunctionMode):
    """Hands calls of the innermost owner to its sites."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        op = op_of(func, args)
        if op is not None:
            site = _running.frames[-1].next(op.kind)
            if site is not None:
                return site.call(op, func, args, kwargs)
        elif func in DECOMPOSED:
            with self:
                return DECOMPOSED[func](*args, **kwargs)
        return func(*args, **kwargs)


def inside_owner() -> bool:
    """Whether an owner's forward runs in this thread."""
    return bool(_running.frames)


class Owner(nn.Module):
    """Marks the modules that have sites; see `make_owner`."""

    float_class: type[nn.Module]

    @not_compiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float forward, with its sites quantized."""
        _running.frames.append(_Frame(self._modules[SITES]._modules))  # type: ignore[union-attr, arg-type]
        try:
            if len(_running.frames) > 1:
                return self.float_class.forward(self, *args, **kwargs)
            with _SiteMode():
                return self.float_class.forward(self, *args, **kwargs)
        finally:
            _running.frames.pop()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the float class: this one is made at run time."""
        return _new_owner, (self.float_class,), self.__dict__


_made: dict[type[nn.Module], type[nn.Module]] = {}


def _owner_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The owner's class of a float class, made once."""
    if kind not in _made:
        members = {"float_class": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
        _made[kind] = type(f"Quantized{kind.__name__}", (Owner, kind), members)
    return _made[kind]


def _new_owner(kind: type[nn.Module]) -> nn.Module:
    made = _owner_class(kind)
    return made.__new__(made)


def make_owner(module: nn.Module, sites: Mapping[str, Site]) -> None:
    """Turn a module into the owner of `sites`, in place."""
    module.__class__ = _owner_class(type(module))
    module.add_module(SITES, nn.ModuleDict(dict(sites)))
