"""From a trace to a converted model: which call is quantized, how its tensors are shared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nipq_search.errors import UserError
from nipq_search.quant.bit_width import BitWidth
from nipq_search.quant.config import FLOAT, Granularity, QuantConfig, Start
from nipq_search.quant.flow import PARAMETER
from nipq_search.quant.graph import FLOAT_BITS, Graph, LayerInfo, TensorInfo
from nipq_search.quant.groups import share_bits, tensor_groups
from nipq_search.quant.layers import LAYERS, QuantLayer, convert
from nipq_search.quant.noise import NoiseClock
from nipq_search.quant.pins import LayerName, pins_of
from nipq_search.quant.quantizer import QUANTIZERS, FakeQuantizer
from nipq_search.quant.sites import Site, guard, make_owner, site_key
from nipq_search.quant.statistics import weight_statistics
from nipq_search.quant.trace import Call, Operand, Trace, parameter_homes

UNTRAINED = "the table is not trained"
IDLE = "did not run on the example inputs"

FIRST, SECOND = "input", "second"
"""Slots of the activations that a layer consumes; they end the names of tensors."""


@dataclass
class Layer:
    """A call that becomes a layer of the graph.

    Attributes:
        call: what was traced.
        name: name of the layer.
        kind: its kind.
        weight: the operand that is a weight, or None.
        slots: the operands that are activations.
        why: why nothing of it can be quantized; empty where it can.
        pin: bit-width, `float` or None.
    """

    call: Call
    name: str
    kind: str
    weight: int | None = None
    slots: dict[str, int] = field(default_factory=dict)
    why: str = ""
    pin: int | str | None = None

    @property
    def in_float(self) -> bool:
        """Whether no operand gets a quantizer."""
        return bool(self.why)

    def operands(self, index: int) -> list[Operand]:
        """One operand of every time that the call was made."""
        found = (pair[index] for pair in self.call.operands)
        return [operand for operand in found if operand is not None]


def find_layers(found: Trace, products: bool) -> list[Layer]:
    """The layers of a trace, named, in order of execution; sums are left out.

    Args:
        found: the trace.
        products: whether products of two activations are to be quantized.
    """
    layers: list[Layer] = []
    taken: set[str] = set()
    for call in found.calls:
        if call.op is not None and call.op.is_sum:
            continue
        layer = Layer(call, "", call.op.kind if call.op else call.function)
        if not _assign(layer, products):
            continue
        layer.name = _name(layer, taken)
        taken.add(layer.name)
        layers.append(layer)
    return layers


def _assign(layer: Layer, products: bool) -> bool:
    """Say which operand is what, or why the layer stays in float; False if it is none at all."""
    call = layer.call
    first, second = call.operands[0]
    if call.op is not None and call.op.is_lookup:
        layer.weight = 1
        if second is None or not second.is_weight:
            return False
        layer.why = "" if second.trained else UNTRAINED
        return True
    if not call.macs and not call.label:
        return False
    if call.op is None:
        layer.why = f"{call.function} has no quantized form"
    elif first is None or second is None:
        layer.why = "an operand is no tensor of floating-point numbers"
    elif second.is_weight and (not first.is_weight or _goes_through(call, first, second)):
        layer.weight, layer.slots = 1, {FIRST: 0}
    elif first.is_weight and not second.is_weight:
        layer.weight, layer.slots = 0, {FIRST: 1}
    elif first.is_activation and second.is_activation:
        layer.slots = {FIRST: 0, SECOND: 1}
        if not products:
            layer.why = "products of activations are left out by quant.products"
    elif first.is_weight:
        layer.why = "both operands are computed from parameters alone"
    else:
        layer.why = "an operand is a constant"
    return True


def _goes_through(call: Call, first: Operand, second: Operand) -> bool:
    """Whether of two operands made of parameters the second is the weight of the first."""
    assert call.op is not None and call.op.first is not None
    is_layer = call.op.first.axis is None and call.op.second.axis is not None
    return second.parameter is not None and (is_layer or first.parameter is None)


def _name(layer: Layer, taken: set[str]) -> str:
    call = layer.call
    operand = None if layer.weight is None else call.operands[0][layer.weight]
    if operand is not None and operand.parameter is not None:
        name = operand.parameter.removesuffix("weight").rstrip("._")
        if name not in taken and (name or not call.owner):
            return name
    if operand is not None and call.owner not in taken:
        return call.owner
    base = ".".join(part for part in (call.owner, layer.kind) if part)
    names = itertools.chain([base], (f"{base}_{n}" for n in itertools.count(1)))
    return next(name for name in names if name not in taken)


class Builder:
    """Builds quantizers and the graph from a trace; one per call of `prepare`."""

    def __init__(self, model: nn.Module, found: Trace, config: QuantConfig) -> None:
        """Name the layers and apply the pins; nothing is converted yet."""
        self.model, self.found, self.config = model, found, config
        self.clock = NoiseClock(config.seed)
        self.tensors: dict[str, TensorInfo] = {}
        self.sites: dict[str, dict[str, Site]] = {}
        self.quantizers: dict[str, FakeQuantizer] = {}
        self.idle: set[str] = set()
        self.keys = itertools.count()
        self.parameters = {name: p.numel() for name, p in model.named_parameters()}
        self.layers = find_layers(found, config.products)
        self.sums = find_sums(found)
        names = [LayerName(x.name, x.kind, x.weight is not None) for x in self.layers]
        names += [LayerName(name, "add", False) for name in self.sums if config.residuals]
        pins = pins_of(names, config)
        self.sum_pins = dict(zip(self.sums, pins[len(self.layers) :], strict=False))
        for layer, pin in zip(self.layers, pins, strict=False):
            layer.pin = pin.bits
            if pin.bits == FLOAT and not layer.why:
                layer.why = pin.why
        self.consumers: dict[Any, list[tuple[Layer, str]]] = {}
        for layer in self.layers:
            for slot in layer.slots:
                self.consumers.setdefault(self._key(layer, slot), []).append((layer, slot))
        self.weight_uses: dict[str, list[Layer]] = {}
        for layer in self.layers:
            if layer.weight is not None:
                self.weight_uses.setdefault(self._weight_key(layer), []).append(layer)
        for uses in self.weight_uses.values():
            if any(not use.why for use in uses):
                for use in uses:  # a table that is not trained, but is another layer's weight
                    use.why = "" if use.why == UNTRAINED else use.why

    def _key(self, layer: Layer, slot: str) -> Any:
        """Slots with equal keys consume the same tensor; one filled by several has its own."""
        keys = {operand.key for operand in layer.operands(layer.slots[slot])}
        return keys.pop() if len(keys) == 1 else (layer.name, slot)

    def _weight_key(self, layer: Layer) -> str:
        """Layers with equal keys use the same parameter."""
        assert layer.weight is not None
        operand = layer.operands(layer.weight)[0]
        return operand.parameter or f"of {layer.name}"

    def _quantizer(self, name: str, allowed: tuple[int, ...], channels: int) -> FakeQuantizer:
        kind = QUANTIZERS[self.config.quantizer]
        key = next(self.keys)
        bits = BitWidth(allowed, self.config.start_bits, learned=kind.learns_bits, key=key)
        quantizer = kind(name, bits, channels, self.clock, key, self.config.proxy.value)
        self.quantizers[name] = quantizer
        return quantizer

    def _weight(self, layer: Layer) -> tuple[str, FakeQuantizer | None]:
        """Name and quantizer of a layer's weight; one for all layers that use the parameter."""
        config, uses = self.config.weights, self.weight_uses[self._weight_key(layer)]
        quantized = [use for use in uses if not use.in_float]
        if quantized and any(use.pin == FLOAT for use in uses):
            raise UserError(
                f"quant.pin: {', '.join(use.name for use in uses)} share a weight, and some of "
                "them are to stay in float; pin them alike"
            )
        name = f"{(quantized or uses)[0].name}.weight"
        values = [_weight_value(use) for use in uses]
        numel = _stored(values[0])
        if layer.in_float:
            info = TensorInfo(name=name, role="weight", numel=numel, fixed_bits=FLOAT_BITS)
            self.tensors.setdefault(name, info)
            return name, None
        if name in self.quantizers:
            return name, self.quantizers[name]
        allowed = self._allowed(quantized, config.bits)
        axes = [_axis(use) for use in quantized]
        places = {
            None if axis is None else (value.stride(axis), value.shape[axis])
            for axis, value in zip(axes, map(_weight_value, quantized), strict=True)
        }
        axis = axes[0] if len(places) == 1 else None
        per_channel = config.granularity is Granularity.PER_CHANNEL and axis is not None
        value = _weight_value(quantized[0])
        if per_channel:
            assert axis is not None
            value = value.movedim(axis, 0)
        quantizer = self._quantizer(name, allowed, len(value) if per_channel else 1)
        quantizer.role = "weight"
        quantizer.initialize(weight_statistics(value, per_channel, config.start is Start.MSE))
        self.tensors[name] = TensorInfo(
            name=name, role="weight", numel=numel, scales=quantizer.channels, allowed=allowed
        )
        return name, quantizer

    def _allowed(self, uses: list[Layer], searched: tuple[int, ...]) -> tuple[int, ...]:
        pins = {use.pin for use in uses} - {None}
        if len(pins) > 1:
            raise UserError(
                f"quant.pin: {', '.join(use.name for use in uses)} consume the same tensor, or "
                "share a weight, and are pinned to different bit-widths; pin them alike"
            )
        return (int(pins.pop() or 0),) if pins else searched

    def _activation(self, layer: Layer, slot: str) -> tuple[str, FakeQuantizer | None]:
        """Name and quantizer of what a layer consumes; one for all that consume the tensor."""
        consumers = self.consumers[self._key(layer, slot)]
        operands = layer.operands(layer.slots[slot])
        numel = max(1, max(operand.numel for operand in operands) // self.found.batch)
        quantized = [(other, at) for other, at in consumers if not other.in_float]
        name = _tensor_name(consumers[0])
        fixed: int | None = FLOAT_BITS if layer.in_float else None
        if self.config.input_bits is not None and all(operand.raw for operand in operands):
            fixed = self.config.input_bits
        elif layer.in_float and quantized:
            name = _tensor_name((layer, slot))  # beside the quantized tensor stays the float one
        if fixed is not None:
            self.tensors[name] = TensorInfo(
                name=name, role="activation", numel=numel, fixed_bits=fixed
            )
            return name, None
        name = _tensor_name(quantized[0])
        if name in self.quantizers:
            return name, self.quantizers[name]
        allowed = self._allowed([other for other, _ in quantized], self.config.activations.bits)
        quantizer = self._quantizer(name, allowed, 1)
        self.tensors[name] = TensorInfo(
            name=name, role="activation", numel=numel, scales=1, allowed=allowed
        )
        return name, quantizer

    def _sums(self) -> dict[str, list[Call]]:
        """Note residual sums; with `quant.residuals` both terms share a quantizer."""
        quantized: dict[str, list[Call]] = {}
        for name, call in self.sums.items():
            numel = call.outputs // self.found.batch
            pin = self.sum_pins.get(name)
            if pin is None or pin.bits == FLOAT:
                self.tensors[name] = TensorInfo(
                    name=name, role="addition", numel=numel, fixed_bits=FLOAT_BITS
                )
                continue
            searched = self.config.activations.bits
            allowed = searched if pin.bits is None else (int(pin.bits),)
            quantizer = self._quantizer(name, allowed, 1)
            self.tensors[name] = TensorInfo(
                name=name, role="addition", numel=numel, scales=1, allowed=allowed
            )
            self._add_site(call, Site(quantizer, quantizer))
            quantized[name] = [call]
        return quantized

    def _add_site(self, call: Call, site: Site) -> None:
        assert call.op is not None
        key = site_key(call.op.kind, call.label, call.ordinal)
        self.sites.setdefault(call.owner, {})[key] = site

    def build(self) -> tuple[Graph, nn.ModuleDict]:
        """Convert every layer in place; return the graph, and the sites by owner."""
        modules = dict(self.model.named_modules())
        infos = [self._layer(layer, modules) for layer in self.layers]
        infos += self._idle_layers(modules)
        quantized_sums = self._sums()
        if self.found.unseen_macs:
            infos.append(
                LayerInfo(
                    name="(unconverted)",
                    kind="functional",
                    macs=round(self.found.unseen_macs / self.found.batch),
                    weight=None,
                    input=None,
                    why="outside Python functions, as in TorchScript",
                )
            )
        wanted = self.config.groups
        groups = tensor_groups(wanted, self.layers, infos, quantized_sums, self.tensors)
        share_bits(groups, self.tensors, self.quantizers)
        sites = self._make_owners(modules)
        graph = Graph(
            layers=tuple(infos), tensors=self.tensors, float_parameters=self._float_parameters()
        )
        return graph, sites

    def _idle_layers(self, modules: Mapping[str, nn.Module]) -> list[LayerInfo]:
        """Layers that the example did not reach, such as experts that got no row."""
        covered = self._covered()
        infos = []
        for name, module in modules.items():
            weight = f"{name}.weight"
            if type(module) in LAYERS and weight in self.parameters and weight not in covered:
                self.idle.add(weight)
                self.tensors[weight] = TensorInfo(
                    name=weight,
                    role="weight",
                    numel=self.parameters[weight],
                    fixed_bits=FLOAT_BITS,
                )
                infos.append(
                    LayerInfo(
                        name=name,
                        kind=LAYERS[type(module)].kind,
                        macs=0,
                        weight=weight,
                        input=None,
                        why=IDLE,
                    )
                )
        return infos

    def _make_owners(self, modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
        """Let the modules that have quantized sites run them, and guard the modules within."""
        active = {
            owner: nn.ModuleDict(own)
            for owner, own in self.sites.items()
            if not all(site.is_empty for site in own.values())
        }
        for call in self.found.calls:
            if call.op is not None and call.owner in active:
                key = site_key(call.op.kind, call.label, call.ordinal)
                if key not in active[call.owner]:
                    active[call.owner][key] = Site(None, None)
        homes = {home[0]: home for home in parameter_homes(self.model)}
        for name, module in modules.items():
            around = self.found.inside.get(name, set())
            within = any(o in around or not o or name.startswith(f"{o}.") for o in active)
            if within and name and name not in active and not isinstance(module, QuantLayer):
                guard(module)
        for owner, own in active.items():
            calls = [call for call in self.found.calls if call.owner == owner]
            labels = sorted({call.label.partition("@")[0] for call in calls} - {""})
            make_owner(modules[owner], owner, own, tuple(homes[label] for label in labels))
        return nn.ModuleDict({f"of {o.replace('.', '-')}": own for o, own in active.items()})

    def _layer(self, layer: Layer, modules: Mapping[str, nn.Module]) -> LayerInfo:
        """Give one layer its quantizers and note it."""
        names: dict[str, str] = {}
        operands: list[FakeQuantizer | None] = [None, None]
        for slot, index in layer.slots.items():
            names[slot], operands[index] = self._activation(layer, slot)
        weight = None
        if layer.weight is not None:
            weight, operands[layer.weight] = self._weight(layer)
        call, module = layer.call, modules[layer.call.owner]
        leaf = None if "forward" in vars(module) else LAYERS.get(type(module))
        if leaf is None or leaf.kind != layer.kind:
            if call.op is not None:
                self._add_site(call, Site(operands[0], operands[1]))
        elif operands[1] is not None:
            convert(module, operands[1], operands[0])
        return LayerInfo(
            name=layer.name,
            kind=layer.kind,
            macs=round(call.macs / self.found.batch),
            weight=weight,
            input=names.get(FIRST),
            second=names.get(SECOND),
            why=layer.why,
        )

    def _covered(self) -> set[str]:
        """Names of the parameters that the layers' weights are made of."""
        covered: set[str] = set()
        for layer in self.layers:
            if layer.weight is not None:
                origins = layer.operands(layer.weight)[0].origins
                covered.update(origin.removeprefix(PARAMETER) for origin in origins)
        return covered

    def _float_parameters(self) -> int:
        """Parameters that no weight of the graph is made of."""
        counted = self._covered() | self.idle
        return sum(numel for name, numel in self.parameters.items() if name not in counted)


def find_sums(found: Trace) -> dict[str, Call]:
    """The residual sums of a trace, by name."""
    sums: dict[str, Call] = {}
    for call in found.calls:
        if call.op is not None and call.op.is_sum and _is_residual(call):
            base = ".".join(part for part in (call.owner, "add") if part)
            names = itertools.chain([base], (f"{base}_{n}" for n in itertools.count(1)))
            sums[next(name for name in names if name not in sums)] = call
    return sums


def _stored(value: Tensor) -> int:
    """Elements of a weight as it is stored: an expanded one is not stored more than once."""
    sizes = zip(value.shape, value.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride != 0)


def _tensor_name(use: tuple[Layer, str]) -> str:
    return f"{use[0].name}.{use[1]}"


def _weight_value(layer: Layer) -> Tensor:
    assert layer.weight is not None
    value = layer.operands(layer.weight)[0].value
    assert value is not None
    return value


def _axis(layer: Layer) -> int | None:
    """Dimension of the output channels in a layer's weight."""
    op = layer.call.op
    assert op is not None
    place = op.second if layer.weight == 1 else op.first
    axis = place.axis if place is not None else None
    value = _weight_value(layer)
    return None if axis is None or value.dim() < 2 else axis % value.dim()


def _is_residual(call: Call) -> bool:
    """Whether a sum adds two activations of equal shape."""
    first, second = call.operands[0]
    return (
        first is not None
        and second is not None
        and first.shape == second.shape
        and len(first.shape) > 1
        and first.is_activation
        and second.is_activation
        and first.origins != second.origins  # else a part of an activation function, as in GELU
    )
