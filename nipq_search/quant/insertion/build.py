"""Conversion of a traced model: quantization of its calls, with quantizers shared as needed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nipq_search.errors import UserError
from nipq_search.quant.config import FLOAT, Granularity, QuantConfig, Start
from nipq_search.quant.graph import FLOAT_BITS, Graph, LayerInfo, TensorInfo
from nipq_search.quant.insertion.groups import share_bits, tensor_groups
from nipq_search.quant.insertion.layers import LAYERS, QuantLayer, convert
from nipq_search.quant.insertion.pins import LayerName, Pin, pins_of
from nipq_search.quant.numerics.noise import NoiseClock
from nipq_search.quant.quantizers.base import QUANTIZERS, FakeQuantizer, TensorRole
from nipq_search.quant.quantizers.bit_width import BitWidth
from nipq_search.quant.quantizers.statistics import weight_statistics
from nipq_search.quant.tracing.flow import PARAMETER
from nipq_search.quant.tracing.roles import (
    FIRST,
    IDLE,
    SECOND,
    UNTRAINED,
    Layer,
    find_layers,
    find_sums,
    stored_elements,
    weight_axis,
    weight_value,
)
from nipq_search.quant.tracing.sites import Site, guard, make_owner, site_key
from nipq_search.quant.tracing.trace import Call, Trace, parameter_locations


class Builder:
    """Builds the quantizers and the graph from a trace; one instance per call to `prepare`."""

    def __init__(self, model: nn.Module, found: Trace, config: QuantConfig) -> None:
        """Name the layers and apply the pins; `build` converts the model.

        Args:
            model: copy of the float model, converted in place by `build`.
            found: trace of the model.
            config: quantization settings.

        Raises:
            UserError: a layer pattern matches no layer.
        """
        self.model, self.found, self.config = model, found, config
        self.clock = NoiseClock(config.seed)
        self.tensors: dict[str, TensorInfo] = {}
        self.sites: dict[str, dict[str, Site]] = {}
        self.quantizers: dict[str, FakeQuantizer] = {}
        self.idle: set[str] = set()
        self.keys = itertools.count()
        self.parameters = {name: p.numel() for name, p in model.named_parameters()}
        layers = find_layers(found, config.products)
        self.sums = find_sums(found)
        names = [LayerName(x.name, x.kind, x.weight is not None) for x in layers]
        names += [LayerName(name, "add", False) for name in self.sums if config.residuals]
        pins = pins_of(names, config)
        self.sum_pins = dict(zip(self.sums, pins[len(layers) :], strict=False))
        self.layers = _with_shared_tables(
            [_pinned(layer, pin) for layer, pin in zip(layers, pins, strict=False)]
        )
        self.consumers: dict[Any, list[tuple[Layer, str]]] = {}
        for layer in self.layers:
            for slot in layer.slots:
                self.consumers.setdefault(self._key(layer, slot), []).append((layer, slot))
        self.weight_uses: dict[str, list[Layer]] = {}
        for layer in self.layers:
            if layer.weight is not None:
                self.weight_uses.setdefault(_weight_key(layer), []).append(layer)

    def _key(self, layer: Layer, slot: str) -> Any:
        """Return a key that is equal for slots that consume the same tensor.

        A slot that consumes several tensors has a key of its own.
        """
        keys = {operand.key for operand in layer.operands(layer.slots[slot])}
        return keys.pop() if len(keys) == 1 else (layer.name, slot)

    def _quantizer(
        self, name: str, allowed: tuple[int, ...], role: TensorRole, channels: int = 1
    ) -> FakeQuantizer:
        """Create a quantizer and register it under the name of its tensor."""
        kind = QUANTIZERS[self.config.quantizer]
        key = next(self.keys)
        bits = BitWidth(allowed, self.config.start_bits, learned=kind.learns_bits, key=key)
        quantizer = kind(name, bits, channels, self.clock, key, self.config.proxy.value, role)
        self.quantizers[name] = quantizer
        return quantizer

    def _weight(self, layer: Layer) -> tuple[str, FakeQuantizer | None]:
        """Return the name and the quantizer of a layer's weight.

        Layers that use the same parameter share the name and the quantizer.
        """
        config, uses = self.config.weights, self.weight_uses[_weight_key(layer)]
        quantized = [use for use in uses if not use.in_float]
        if quantized and any(use.pin == FLOAT for use in uses):
            raise UserError(
                f"quant.pin: {', '.join(use.name for use in uses)} share a weight, but only some "
                "of them are pinned to float; use the same pin for all of them"
            )
        name = f"{(quantized or uses)[0].name}.weight"
        values = [weight_value(use) for use in uses]
        numel = stored_elements(values[0])
        if layer.in_float:
            info = TensorInfo(
                name=name, role=TensorRole.WEIGHT, numel=numel, fixed_bits=FLOAT_BITS
            )
            self.tensors.setdefault(name, info)
            return name, None
        if name in self.quantizers:
            return name, self.quantizers[name]
        allowed = self._allowed(quantized, config.bits)
        axes = [weight_axis(use) for use in quantized]
        places = {
            None if axis is None else (value.stride(axis), value.shape[axis])
            for axis, value in zip(axes, map(weight_value, quantized), strict=True)
        }
        axis = axes[0] if len(places) == 1 else None
        per_channel = config.granularity is Granularity.PER_CHANNEL and axis is not None
        value = weight_value(quantized[0])
        if per_channel:
            assert axis is not None
            value = value.movedim(axis, 0)
        channels = len(value) if per_channel else 1
        quantizer = self._quantizer(name, allowed, TensorRole.WEIGHT, channels)
        quantizer.initialize(weight_statistics(value, per_channel, config.start is Start.MSE))
        self.tensors[name] = TensorInfo(
            name=name,
            role=TensorRole.WEIGHT,
            numel=numel,
            scales=quantizer.channels,
            allowed=allowed,
        )
        return name, quantizer

    def _allowed(self, uses: list[Layer], searched: tuple[int, ...]) -> tuple[int, ...]:
        """Return the width to which the layers that use a tensor are pinned, or `searched`."""
        pins = {use.pin for use in uses} - {None}
        if len(pins) > 1:
            raise UserError(
                f"quant.pin: {', '.join(use.name for use in uses)} consume the same tensor or "
                "share a weight, but are pinned to different bit-widths; use the same pin for "
                "all of them"
            )
        return (int(pins.pop() or 0),) if pins else searched

    def _activation(self, layer: Layer, slot: str) -> tuple[str, FakeQuantizer | None]:
        """Return the name and the quantizer of an input of a layer.

        Layers that consume the same tensor share the name and the quantizer.
        """
        consumers = self.consumers[self._key(layer, slot)]
        operands = layer.operands(layer.slots[slot])
        numel = max(1, max(operand.numel for operand in operands) // self.found.batch)
        quantized = [(other, at) for other, at in consumers if not other.in_float]
        name = _tensor_name(consumers[0])
        fixed: int | None = FLOAT_BITS if layer.in_float else None
        if self.config.input_bits is not None and all(operand.raw for operand in operands):
            fixed = self.config.input_bits
        elif layer.in_float and quantized:
            name = _tensor_name((layer, slot))  # other consumers quantize the tensor
        if fixed is not None:
            self.tensors[name] = TensorInfo(
                name=name, role=TensorRole.ACTIVATION, numel=numel, fixed_bits=fixed
            )
            return name, None
        name = _tensor_name(quantized[0])
        if name in self.quantizers:
            return name, self.quantizers[name]
        allowed = self._allowed([other for other, _ in quantized], self.config.activations.bits)
        quantizer = self._quantizer(name, allowed, TensorRole.ACTIVATION)
        self.tensors[name] = TensorInfo(
            name=name, role=TensorRole.ACTIVATION, numel=numel, scales=1, allowed=allowed
        )
        return name, quantizer

    def _sums(self) -> dict[str, list[Call]]:
        """Record residual sums; with `quant.residuals`, both terms share one quantizer.

        Returns:
            The calls of each quantized sum, by tensor name.
        """
        quantized: dict[str, list[Call]] = {}
        for name, call in self.sums.items():
            numel = call.outputs // self.found.batch
            pin = self.sum_pins.get(name)
            if pin is None or pin.bits == FLOAT:
                self.tensors[name] = TensorInfo(
                    name=name, role=TensorRole.ADDITION, numel=numel, fixed_bits=FLOAT_BITS
                )
                continue
            searched = self.config.activations.bits
            allowed = searched if pin.bits is None else (int(pin.bits),)
            quantizer = self._quantizer(name, allowed, TensorRole.ADDITION)
            self.tensors[name] = TensorInfo(
                name=name, role=TensorRole.ADDITION, numel=numel, scales=1, allowed=allowed
            )
            self._add_site(call, Site(quantizer, quantizer))
            quantized[name] = [call]
        return quantized

    def _add_site(self, call: Call, site: Site) -> None:
        """Record the site of a call; `_make_owners` puts it into effect."""
        assert call.op is not None
        key = site_key(call.op.kind, call.label, call.ordinal)
        self.sites.setdefault(call.owner, {})[key] = site

    def build(self) -> tuple[Graph, nn.ModuleDict]:
        """Convert every layer in place and return the graph and the sites by owner.

        Raises:
            UserError: pins contradict each other, a layer pattern in `quant.groups` matches no
                layer, or a group has no common bit-width.
        """
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
                    float_reason="outside Python functions, as in TorchScript",
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
        """Record and return the layers that did not run on the example inputs."""
        covered = self._covered()
        infos = []
        for name, module in modules.items():
            weight = f"{name}.weight"
            if type(module) in LAYERS and weight in self.parameters and weight not in covered:
                self.idle.add(weight)
                self.tensors[weight] = TensorInfo(
                    name=weight,
                    role=TensorRole.WEIGHT,
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
                        float_reason=IDLE,
                    )
                )
        return infos

    def _make_owners(self, modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
        """Convert modules with quantized sites into owners, and guard the modules inside them."""
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
        locations = {location.name: location for location in parameter_locations(self.model)}
        for name, module in modules.items():
            around = self.found.inside.get(name, set())
            within = any(o in around or not o or name.startswith(f"{o}.") for o in active)
            if within and name and name not in active and not isinstance(module, QuantLayer):
                guard(module)
        for owner, own in active.items():
            calls = [call for call in self.found.calls if call.owner == owner]
            labels = sorted({call.label.partition("@")[0] for call in calls} & locations.keys())
            make_owner(modules[owner], owner, own, tuple(locations[label] for label in labels))
        return nn.ModuleDict({o.replace(".", "/") or "(root)": own for o, own in active.items()})

    def _layer(self, layer: Layer, modules: Mapping[str, nn.Module]) -> LayerInfo:
        """Attach the quantizers of one layer and return its entry in the graph."""
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
            float_reason=layer.float_reason,
            float_requested=layer.float_requested,
        )

    def _covered(self) -> set[str]:
        """Return the names of the parameters from which the weights of the layers are computed."""
        covered: set[str] = set()
        for layer in self.layers:
            if layer.weight is not None:
                origins = layer.operands(layer.weight)[0].origins
                covered.update(origin.removeprefix(PARAMETER) for origin in origins)
        return covered

    def _float_parameters(self) -> int:
        """Return the number of elements of all parameters outside the weights of the graph."""
        counted = self._covered() | self.idle
        return sum(numel for name, numel in self.parameters.items() if name not in counted)


def _pinned(layer: Layer, pin: Pin) -> Layer:
    """Return a layer with its pin applied."""
    if pin.bits != FLOAT:
        return dataclasses.replace(layer, pin=pin.bits)
    reason = layer.float_reason or pin.float_reason
    return dataclasses.replace(layer, pin=FLOAT, float_reason=reason, float_requested=True)


def _with_shared_tables(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers; an untrained table has no float reason if a quantized layer shares it."""
    quantized = {_weight_key(x) for x in layers if x.weight is not None and not x.in_float}
    return [
        dataclasses.replace(layer, float_reason="")
        if layer.float_reason == UNTRAINED and _weight_key(layer) in quantized
        else layer
        for layer in layers
    ]


def _weight_key(layer: Layer) -> str:
    """Return a key that is equal for layers that use the same parameter as their weight."""
    assert layer.weight is not None
    operand = layer.operands(layer.weight)[0]
    return operand.parameter or f"of {layer.name}"


def _tensor_name(use: tuple[Layer, str]) -> str:
    return f"{use[0].name}.{use[1]}"
