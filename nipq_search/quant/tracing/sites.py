"""Quantization of multiplications in a module's own code, without editing the module.

A *site* is the n-th call of a given kind of function (see `ops.OPS`) with a given parameter, or
without a parameter, in a module's forward method: `F.linear(x, self.qkv.weight)`,
`q @ k.transpose(-2, -1)`, or the convolution in a subclass with its own forward method. `prepare`
finds the sites of a model in one traced forward pass and converts each module with sites into an
*owner*. During an owner's forward pass, a torch function mode intercepts every call; at a site, it
passes the operands through the site's quantizers. Modules inside an owner are guarded, so their
calls are not attributed to the owner.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nipq_search.quant.kernels.kept import flattened, recompute_operands
from nipq_search.quant.numerics.noise import not_compiled
from nipq_search.quant.quantizers.base import FakeQuantizer
from nipq_search.quant.tracing.ops import DECOMPOSED, DECOMPOSED_KINDS, IN_PLACE, Op, op_of

OTHER = "another parameter"
"""Label of a parameter that a `ParameterTable` does not contain."""


class ParameterLocation(NamedTuple):
    """Location of a parameter.

    Attributes:
        name: name of the parameter in the model.
        module: the module that holds it.
        key: name of the parameter in that module.
    """

    name: str
    module: nn.Module
    key: str


class ParameterTable:
    """Maps a tensor, by memory address, to the parameter that it equals or is a slice of."""

    def __init__(self, locations: Iterable[ParameterLocation]) -> None:
        """Read the current addresses of the parameters, which may have moved since the trace."""
        self._places: dict[int, list[tuple[int, int, str]]] = {}
        for name, module, key in locations:
            parameter = getattr(module, key)
            if isinstance(parameter, Tensor) and parameter.layout is torch.strided:
                place = (int(parameter.storage_offset()), parameter.numel(), name)
                self._places.setdefault(_storage(parameter), []).append(place)

    def label(self, x: Any) -> str:
        """Return the label of the parameter that `x` belongs to, or an empty string.

        The label is the parameter's name, `name@n` for a slice that starts at element n, or
        `OTHER` for a parameter that the table does not contain.
        """
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            return ""
        found = self._places.get(_storage(x))
        for start, numel, name in found or ():
            offset = int(x.storage_offset()) - start
            if 0 <= offset < numel:
                return name if offset == 0 and x.numel() == numel else f"{name}@{offset}"
        # A parameter of another module, as in a power iteration that runs only in training.
        return OTHER if isinstance(x._base if x._is_view() else x, nn.Parameter) else ""

    def label_of_call(self, op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Return the label of the parameter among a call's operands.

        Args:
            op: the entry of the called function in `ops.OPS`.
            args: positional arguments.
            kwargs: keyword arguments.

        Returns:
            The label of the second operand or, if it is not a parameter, of the first; an empty
            string if neither is a parameter.
        """
        label = self.label(op.second.of(args, kwargs))
        if label or op.first is None:
            return label
        return self.label(op.first.of(args, kwargs))


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def site_key(kind: str, label: str, ordinal: int) -> str:
    """Return the name of a site within its owner.

    Args:
        kind: kind of the function.
        label: label of the parameter, or an empty string; see `ParameterTable`.
        ordinal: index among the calls of that kind and parameter.

    Returns:
        The non-empty fields, joined by slashes; dots in the label become hyphens.
    """
    parts = (kind, label.replace(".", "-"), str(ordinal))
    return "/".join(part for part in parts if part)


class Site(nn.Module):
    """Quantizers of one call; an operand without a quantizer is passed unchanged."""

    def __init__(self, first: FakeQuantizer | None, second: FakeQuantizer | None) -> None:
        """Store the quantizers of the first and the second operand."""
        super().__init__()
        self.first, self.second = first, second

    @property
    def is_empty(self) -> bool:
        """Whether nothing is quantized."""
        return self.first is None and self.second is None

    def call(self, op: Op, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a function on quantized operands; an embedding quantizes its result instead.

        Args:
            op: the called function's entry in `ops.OPS`.
            func: the called function.
            args: positional arguments.
            kwargs: keyword arguments.

        Returns:
            The result of the function.
        """
        if op.reads_rows:
            return self._lookup(func, args, kwargs)
        target = None
        if func in IN_PLACE:
            # The quantizer saves its operand for the backward pass; the sum must not overwrite it.
            target = args[0]
            args, func = (target.clone(), *args[1:]), torch.add
        values = []
        for operand, quantizer in ((op.first, self.first), (op.second, self.second)):
            if operand is not None and quantizer is not None:
                value = operand.of(args, kwargs)
                if operand.kept_dims is not None:
                    value = flattened(value, operand.kept_dims)
                value = quantizer(value, axis=operand.axis)
                args, kwargs = operand.replaced(args, kwargs, value)
                values.append(value)
        with recompute_operands(*values):
            result = func(*args, **kwargs)
        return result if target is None else target.copy_(result)

    def _lookup(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Look up rows, and quantize them instead of the whole table."""
        rows: Tensor = func(*args, **kwargs)
        if self.second is None:
            return rows
        index = args[0] if args else kwargs["input"]
        flat = rows.reshape(-1, rows.shape[-1])
        # A clone, because the model may overwrite it and the quantizer may have saved its result.
        return self.second(flat, rows=index.reshape(-1)).view_as(rows).clone()


class _Frame:
    """A running forward pass of an owner, or of a guarded module, which has no sites."""

    def __init__(
        self,
        name: str = "",
        sites: Mapping[str, Site] | None = None,
        locations: Iterable[ParameterLocation] = (),
    ) -> None:
        self.name, self.sites = name, sites or {}
        self.parameters = ParameterTable(locations)
        self.counts: dict[tuple[str, str], int] = {}
        self.kinds: frozenset[str] | None = None
        self.with_gradients = torch.is_grad_enabled()

    def site(self, op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Site | None:
        """Count the current call and return its site, or None.

        A loop over a longer sequence than the traced one makes more calls. Additional calls with
        a parameter use the last site of that parameter; others stay in float.

        Args:
            op: the called function's entry in `ops.OPS`.
            args: positional arguments.
            kwargs: keyword arguments.

        Returns:
            The site, or None if the call stays in float.
        """
        if not self.sites or (self.kinds is not None and op.kind not in self.kinds):
            return None
        label = self.parameters.label_of_call(op, args, kwargs)
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
    """Return the number of traced calls with no parameter among their operands, by kind."""
    kinds = (key.split("/") for key in sites)
    return dict(collections.Counter(parts[0] for parts in kinds if len(parts) == 2))


def _check_counts(owner: nn.Module, frame: _Frame) -> None:
    """Warn once if training computes more products than the traced forward pass."""
    if "_warned" in vars(owner):
        return
    found = {kind: n for (kind, label), n in frame.counts.items() if not label}
    for kind, traced in _expected(frame.sites).items():
        if kind != "add" and found.get(kind, 0) > traced:
            vars(owner)["_warned"] = True
            warnings.warn(
                f"{frame.name or 'the model'} computes {found[kind]} products of activations "
                f"({kind}) in training but {traced} in the traced forward pass: the additional "
                "ones stay in float or use the wrong quantizers. Move computations that run only "
                "in training into a separate module, or exclude the layer",
                stacklevel=2,
            )


def _check_gradients(name: str) -> None:
    """Warn if gradients were disabled between the start of an owner's forward pass and a site."""
    if not torch.is_grad_enabled():
        warnings.warn(
            f"{name or 'the model'} multiplies while gradients are disabled, as in a reentrant "
            "checkpoint of one of its methods or in a custom autograd function: the quantizers "
            "there do not learn. Checkpoint whole modules, or exclude the layer",
            stacklevel=4,
        )


class _Running(threading.local):
    """Stack of the owners and guarded modules whose forward passes are running in this thread."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []


_running = _Running()


class _SiteMode(TorchFunctionMode):
    """Redirects calls made by the innermost owner to its sites."""

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
            # Other operations of the decomposed function, such as adding a mask, are not sites.
            before, frame.kinds = frame.kinds, DECOMPOSED_KINDS
            try:
                with self:
                    return DECOMPOSED[func](*args, **kwargs)
            finally:
                frame.kinds = before
        return func(*args, **kwargs)


def inside_owner() -> bool:
    """Whether the forward pass of an owner is running in this thread."""
    return bool(_running.frames)


def _enter(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a guarded module: attribute the following calls to no owner."""
    if _running.frames:
        _running.frames.append(_Frame())


def _leave(module: nn.Module, args: Any, out: Any) -> None:
    """Forward hook of a guarded module: attribute the following calls to the owner again."""
    if len(_running.frames) > 1 and not _running.frames[-1].sites:
        _running.frames.pop()


def guard(module: nn.Module) -> None:
    """Hide the calls of a module without sites from the enclosing owner."""
    module.register_forward_pre_hook(_enter)
    # Runs before other hooks, whose computations belong to the enclosing module.
    module.register_forward_hook(_leave, prepend=True, always_call=True)


class Owner(nn.Module):
    """Base class that marks modules with sites; see `make_owner`."""

    float_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by way of the float class, because this class is created at run time."""
        return _new_owner, (self.float_class,), self.__getstate__()  # type: ignore[no-untyped-call]


@not_compiled
def _run(owner: Any, args: Any, kwargs: Any) -> Any:
    """Run the forward method of the float class with its sites quantized."""
    name, sites, locations, own_forward = vars(owner)["_owned"]
    forward: Callable[..., Any] = own_forward or functools.partial(
        owner.float_class.forward, owner
    )
    frames = _running.frames
    frame = _Frame(name, sites._modules, locations)
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
    """Return the owner class of a float class, created on first use."""
    if kind not in _made:

        @functools.wraps(kind.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            """Run the forward method of the float class with its sites quantized."""
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
    """Create an owner without initializing it, for copying and unpickling."""
    made = _owner_class(kind)
    return made.__new__(made)


def make_owner(
    module: nn.Module, name: str, sites: nn.ModuleDict, locations: tuple[ParameterLocation, ...]
) -> None:
    """Convert a module into the owner of `sites`, in place.

    Args:
        module: a float module.
        name: name of the module in the model.
        sites: sites by `site_key`. They are not registered as children of the module, because a
            container such as `nn.Sequential` would treat them as layers.
        locations: parameters that the sites multiply by.
    """
    # A `forward` set on the instance, as some libraries do, would hide that of the class.
    own_forward = vars(module).pop("forward", None)
    module.__class__ = _owner_class(type(module))
    vars(module)["_owned"] = (name, sites, locations, own_forward)
