"""Multiplications that a module writes out itself, quantized without editing the module.

A *site* is the n-th call of one kind of function (see `ops.OPS`) with one parameter, or without
any, in a module's forward: `F.linear(x, self.qkv.weight)`, `q @ k.transpose(-2, -1)`, a
convolution subclass with a forward of its own. `prepare` finds the sites of a model in one traced
forward and makes each module that has some an *owner*. While an owner's forward runs, a torch
function mode sees every call, and at a site passes the operands through the site's quantizers.
Modules within are guarded, so that an owner never takes their calls for its own.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nipq_search.quant.kernels.kept import flattened, not_keeping
from nipq_search.quant.numerics.noise import not_compiled
from nipq_search.quant.quantizers.base import FakeQuantizer
from nipq_search.quant.tracing.ops import DECOMPOSED, IN_PLACE, PARTS, Op, op_of

OTHER = "another parameter"

Home = tuple[str, nn.Module, str]
"""A parameter: its name in the model, the module that has it, its name there."""


class ParameterTable:
    """Tells of a tensor which parameter it is, or is a part of, by where it lies in memory."""

    def __init__(self, homes: Iterable[Home]) -> None:
        """Look up where the parameters are now: they may have moved since."""
        self._places: dict[int, list[tuple[int, int, str]]] = {}
        for name, module, key in homes:
            parameter = getattr(module, key)
            if isinstance(parameter, Tensor) and parameter.layout is torch.strided:
                place = (int(parameter.storage_offset()), parameter.numel(), name)
                self._places.setdefault(_storage(parameter), []).append(place)

    def label(self, x: Any) -> str:
        """The parameter's name, `name@n` for a part that begins at element n, or nothing.

        A parameter that the table does not hold is `OTHER`.
        """
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            return ""
        found = self._places.get(_storage(x))
        for start, numel, name in found or ():
            offset = int(x.storage_offset()) - start
            if 0 <= offset < numel:
                return name if offset == 0 and x.numel() == numel else f"{name}@{offset}"
        # One of another module, as in a power iteration that only training makes.
        return OTHER if isinstance(x._base if x._is_view() else x, nn.Parameter) else ""

    def of_call(self, op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """The parameter that a call multiplies with."""
        label = self.label(op.second.of(args, kwargs))
        if label or op.first is None:
            return label
        return self.label(op.first.of(args, kwargs))


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def site_key(kind: str, label: str, ordinal: int) -> str:
    """Name of a site within its owner."""
    parts = (kind, label.replace(".", "-"), str(ordinal))
    return "/".join(part for part in parts if part)


class Site(nn.Module):
    """The quantizers of one call; an operand without one passes as it is."""

    def __init__(self, first: FakeQuantizer | None, second: FakeQuantizer | None) -> None:
        """Hold the quantizers of the first and of the second operand."""
        super().__init__()
        self.first, self.second = first, second

    @property
    def is_empty(self) -> bool:
        """Whether nothing is quantized."""
        return self.first is None and self.second is None

    def call(self, op: Op, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run `func` on quantized operands."""
        if op.reads_rows:
            return self._lookup(func, args, kwargs)
        target = None
        if func in IN_PLACE:
            # The quantizer keeps its operand for the backward, so that must not be overwritten.
            target = args[0]
            args, func = (target.clone(), *args[1:]), torch.add
        values = []
        for operand, quantizer in ((op.first, self.first), (op.second, self.second)):
            if operand is not None and quantizer is not None:
                value = operand.of(args, kwargs)
                if operand.taken is not None:
                    value = flattened(value, operand.taken)
                value = quantizer(value, axis=operand.axis)
                args, kwargs = operand.replaced(args, kwargs, value)
                values.append(value)
        with not_keeping(*values):
            result = func(*args, **kwargs)
        return result if target is None else target.copy_(result)

    def _lookup(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Quantize the rows that are read, not the whole table."""
        rows: Tensor = func(*args, **kwargs)
        if self.second is None:
            return rows
        index = args[0] if args else kwargs["input"]
        flat = rows.reshape(-1, rows.shape[-1])
        # The quantizer keeps its result for the backward; the model may overwrite what it gets.
        return self.second(flat, rows=index.reshape(-1)).view_as(rows).clone()


class _Frame:
    """One running forward of an owner, or of a guarded module, which has no sites."""

    def __init__(
        self, name: str = "", sites: Mapping[str, Site] | None = None, homes: Iterable[Home] = ()
    ) -> None:
        self.name, self.sites = name, sites or {}
        self.parameters = ParameterTable(homes)
        self.counts: dict[tuple[str, str], int] = {}
        self.kinds: frozenset[str] | None = None
        self.with_gradients = torch.is_grad_enabled()

    def site(self, op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Site | None:
        """The site of the call that comes now.

        A loop over a longer sequence than the traced one makes more calls. Those with a
        parameter use that parameter's last site, others stay in float.
        """
        if not self.sites or (self.kinds is not None and op.kind not in self.kinds):
            return None
        label = self.parameters.of_call(op, args, kwargs)
        ordinal = self.counts.get((op.kind, label), 0)
        self.counts[op.kind, label] = ordinal + 1
        site = self.sites.get(site_key(op.kind, label, ordinal))
        while site is None and label and ordinal > 0:
            ordinal -= 1
            site = self.sites.get(site_key(op.kind, label, ordinal))
        if site is not None and not site.is_empty and site.training and self.with_gradients:
            _check_gradients(self.name)
        return site


def _expected(sites: Mapping[str, Site]) -> dict[str, int]:
    """How many calls without a parameter the trace saw, by kind."""
    kinds = (key.split("/") for key in sites)
    return dict(collections.Counter(parts[0] for parts in kinds if len(parts) == 2))


def _check_counts(owner: nn.Module, frame: _Frame) -> None:
    """Warn once where training makes more products than the traced forward did."""
    if "_told" in vars(owner):
        return
    found = {kind: n for (kind, label), n in frame.counts.items() if not label}
    for kind, traced in _expected(frame.sites).items():
        if kind != "add" and found.get(kind, 0) > traced:
            vars(owner)["_told"] = True
            warnings.warn(
                f"{frame.name or 'the model'} makes {found[kind]} products of activations "
                f"({kind}) in training and {traced} in the traced forward: what is more stays in "
                "float, or takes another one's quantizers. Move what only training computes into "
                "a module of its own, or exclude the layer",
                stacklevel=2,
            )


def _check_gradients(name: str) -> None:
    """Warn where gradients were switched off between an owner's forward and its site."""
    if not torch.is_grad_enabled():
        warnings.warn(
            f"{name or 'the model'} multiplies where gradients are off, as in a reentrant "
            "checkpoint of one of its methods or in a custom autograd function: the quantizers "
            "there do not learn. Checkpoint whole modules, or exclude the layer",
            stacklevel=4,
        )


class _Running(threading.local):
    """Owners and guarded modules whose forwards run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []


_running = _Running()


class _SiteMode(TorchFunctionMode):
    """Hands calls of the innermost owner to its sites."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        frame = _running.frames[-1]
        op = op_of(func, args, kwargs)
        if op is not None:
            site = frame.site(op, args, kwargs)
            if site is not None:
                return site.call(op, func, args, kwargs)
        elif func in DECOMPOSED and frame.sites:
            # Its other operations, such as adding a mask, are none of the owner's.
            before, frame.kinds = frame.kinds, PARTS
            try:
                with self:
                    return DECOMPOSED[func](*args, **kwargs)
            finally:
                frame.kinds = before
        return func(*args, **kwargs)


def inside_owner() -> bool:
    """Whether an owner's forward runs in this thread."""
    return bool(_running.frames)


def _enter(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a guarded module."""
    if _running.frames:
        _running.frames.append(_Frame())


def _leave(module: nn.Module, args: Any, out: Any) -> None:
    """Forward hook of a guarded module."""
    if len(_running.frames) > 1 and not _running.frames[-1].sites:
        _running.frames.pop()


def guard(module: nn.Module) -> None:
    """Keep the calls of a module, which has no sites, from the owner around it."""
    module.register_forward_pre_hook(_enter)
    # First of all hooks: what the others compute is the surrounding module's, as in the trace.
    module.register_forward_hook(_leave, prepend=True, always_call=True)


class Owner(nn.Module):
    """Marks the modules that have sites; see `make_owner`."""

    float_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the float class: this one is made at run time."""
        return _new_owner, (self.float_class,), self.__getstate__()  # type: ignore[no-untyped-call]


@not_compiled
def _run(owner: Any, args: Any, kwargs: Any) -> Any:
    """The float forward, with its sites quantized."""
    name, sites, homes, own_forward = vars(owner)["_owned"]
    forward: Callable[..., Any] = own_forward or functools.partial(
        owner.float_class.forward, owner
    )
    frames = _running.frames
    frame = _Frame(name, sites._modules, homes)
    frames.append(frame)
    depth = len(frames)
    try:
        with _SiteMode() if depth == 1 else contextlib.nullcontext():
            result = forward(*args, **kwargs)
        if owner.training:
            _check_counts(owner, frame)
        return result
    finally:
        del frames[depth - 1 :]


_made: dict[type[nn.Module], type[nn.Module]] = {}


def _owner_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The owner's class of a float class, made once."""
    if kind not in _made:

        @functools.wraps(kind.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _run(self, args, kwargs)

        members = {
            "float_class": kind,
            "forward": forward,
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
        }
        _made[kind] = type(f"Quantized{kind.__name__}", (Owner, kind), members)
    return _made[kind]


def _new_owner(kind: type[nn.Module]) -> nn.Module:
    made = _owner_class(kind)
    return made.__new__(made)


def make_owner(
    module: nn.Module, name: str, sites: nn.ModuleDict, homes: tuple[Home, ...]
) -> None:
    """Turn a module into the owner of `sites`, in place.

    Args:
        module: the module.
        name: its name in the model.
        sites: its sites by `site_key`. They have another parent: a container, such as
            `nn.Sequential`, would take them for a layer of its own.
        homes: the parameters that its sites multiply with.
    """
    # An instance's own forward, as hooks of other libraries set it, would hide the class's.
    own_forward = vars(module).pop("forward", None)
    module.__class__ = _owner_class(type(module))
    vars(module)["_owned"] = (name, sites, homes, own_forward)
