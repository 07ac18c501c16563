"""From a float model to one that learns its quantization: prepare, calibrate, group, freeze."""

from __future__ import annotations

import copy
import fnmatch
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nipq_search.errors import UserError, nearest
from nipq_search.quant.bit_width import BitWidth
from nipq_search.quant.config import FLOAT, Granularity, QuantConfig, Start
from nipq_search.quant.graph import FLOAT_BITS, Graph, LayerInfo, TensorInfo
from nipq_search.quant.layers import LAYERS, QuantLayer, convert
from nipq_search.quant.noise import NoiseClock, not_compiled
from nipq_search.quant.quantizer import QUANTIZERS, FakeQuantizer
from nipq_search.quant.statistics import Observer, weight_statistics
from nipq_search.quant.trace import Trace, as_arguments, trace, unchanged_mode

STATE = "quant_state"
"""Name of the submodule that `prepare` adds to the root."""

M = TypeVar("M", bound=nn.Module)


class QuantState(nn.Module):
    """Belongs to the root of a prepared model: its graph, its configuration, its noise clock.

    Seed and step of the clock are in the state dict, so that a resumed model continues with the
    noise that it would have seen.
    """

    def __init__(self, graph: Graph, config: QuantConfig, clock: NoiseClock) -> None:
        """Hold what `prepare` found."""
        super().__init__()
        self.graph, self.config, self.clock = graph, config, clock

    def forward(self, x: Any) -> Any:
        """Return `x`: a root such as `nn.Sequential` runs every child."""
        return x

    def get_extra_state(self) -> dict[str, int]:
        """Seed and step of the noise clock."""
        return {"seed": self.clock.seed, "step": self.clock.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continue from a stored seed and step."""
        self.clock.seed, self.clock.step = state["seed"], state["step"]


def unwrap(model: nn.Module) -> nn.Module:
    """The prepared module inside DDP, torch.compile or an averaged (EMA) model.

    Raises:
        UserError: `prepare` never saw this model.
    """
    inner: Any = model
    while STATE not in inner._modules:  # `hasattr` sees through torch.compile's wrapper
        if isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise UserError("the model is not prepared: call nipq_search.prepare first")
    return inner  # type: ignore[no-any-return]


def quant_state(model: nn.Module) -> QuantState:
    """The quantization state of a prepared, possibly wrapped, model."""
    return getattr(unwrap(model), STATE)  # type: ignore[no-any-return]


def quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Every quantizer of a prepared model, by the name of its tensor."""
    found = (m for m in unwrap(model).modules() if isinstance(m, FakeQuantizer))
    return {quantizer.name: quantizer for quantizer in found}


def is_frozen(model: nn.Module) -> bool:
    """Whether all bit-widths are final."""
    return all(quantizer.bits.is_frozen for quantizer in quantizers(model).values())


@not_compiled
def _tick(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of the root: the next step's noise."""
    if module.training:
        getattr(module, STATE).clock.step += 1


class _Builder:
    """Builds quantizers and the graph from a trace; one per call of `prepare`."""

    def __init__(self, model: nn.Module, found: Trace, config: QuantConfig) -> None:
        self.model, self.found, self.config = model, found, config
        self.clock = NoiseClock(config.seed)
        self.tensors: dict[str, TensorInfo] = {}
        self.layers: list[LayerInfo] = []
        self.activations: dict[str, FakeQuantizer] = {}
        self.keys = itertools.count()
        for pattern in config.pin:
            if not fnmatch.filter(found.layers, pattern):
                hint = nearest(pattern.strip("*"), found.layers)
                raise UserError(f"quant.pin.{pattern}: no layer has such a name{hint}")
        self.pins = {name: config.pin_of(name) for name in found.layers}
        self.consumers: dict[Any, list[str]] = {}
        for name in found.layers:
            self.consumers.setdefault(self._key(name), []).append(name)

    def _key(self, layer: str) -> Any:
        """Layers with equal keys consume the same tensor; a layer called twice has its own."""
        inputs = set(self.found.layers[layer].inputs)
        return inputs.pop() if len(inputs) == 1 else layer

    def _quantizer(self, name: str, allowed: tuple[int, ...], channels: int) -> FakeQuantizer:
        kind = QUANTIZERS[self.config.quantizer]
        bits = BitWidth(allowed, self.config.start_bits, learned=kind.learns_bits)
        key = next(self.keys)
        return kind(name, bits, channels, self.clock, key, self.config.proxy.value)

    def _weight(self, layer: str, module: Any) -> FakeQuantizer:
        config, pin = self.config.weights, self.pins[layer]
        allowed = config.bits if pin is None else (int(pin),)
        per_channel = config.granularity is Granularity.PER_CHANNEL
        weight = module.weight
        quantizer = self._quantizer(f"{layer}.weight", allowed, len(weight) if per_channel else 1)
        quantizer.initialize(weight_statistics(weight, per_channel, config.start is Start.MSE))
        self.tensors[quantizer.name] = TensorInfo(
            name=quantizer.name,
            role="weight",
            numel=weight.numel(),
            scales=quantizer.channels,
            allowed=allowed,
        )
        return quantizer

    def _activation(self, layer: str) -> tuple[str, FakeQuantizer | None]:
        """Name and quantizer of a layer's input; one for all layers that consume the tensor."""
        key, call = self._key(layer), self.found.layers[layer]
        name = f"{self.consumers[key][0]}.input"
        in_float = self.pins[layer] == FLOAT
        fixed: int | None = FLOAT_BITS if in_float else None
        if self.config.input_bits is not None and self.found.raw.issuperset(call.inputs):
            fixed = self.config.input_bits
        elif in_float and any(self.pins[other] != FLOAT for other in self.consumers[key]):
            name = f"{layer}.input"  # beside the quantized tensor the float one is kept
        if fixed is not None:
            self.tensors[name] = TensorInfo(
                name=name, role="activation", numel=call.input_numel, fixed_bits=fixed
            )
            return name, None
        quantized = [other for other in self.consumers[key] if self.pins[other] != FLOAT]
        name = f"{quantized[0]}.input"
        if name in self.activations:
            return name, self.activations[name]
        pins = {self.pins[other] for other in quantized} - {None}
        if len(pins) > 1:
            raise UserError(
                f"quant.pin: {', '.join(quantized)} consume the same tensor and are pinned to "
                "different bit-widths; pin them alike"
            )
        allowed = (int(pins.pop() or 0),) if pins else self.config.activations.bits
        quantizer = self.activations[name] = self._quantizer(name, allowed, 1)
        self.tensors[name] = TensorInfo(
            name=name, role="activation", numel=call.input_numel, scales=1, allowed=allowed
        )
        return name, quantizer

    def _layer(self, layer: str, module: Any) -> None:
        """Convert one layer in place, unless it is pinned to float, and note it."""
        kind = LAYERS[type(module)].kind
        source, activation = self._activation(layer)
        weight = f"{layer}.weight"
        if self.pins[layer] == FLOAT:
            numel = module.weight.numel()
            self.tensors[weight] = TensorInfo(
                name=weight, role="weight", numel=numel, fixed_bits=FLOAT_BITS
            )
        else:
            convert(module, self._weight(layer, module), activation)
        macs = self.found.layers[layer].macs
        self.layers.append(
            LayerInfo(name=layer, kind=kind, macs=macs, weight=weight, input=source)
        )

    def build(self) -> Graph:
        """Convert every layer in place and return the graph."""
        modules = dict(self.model.named_modules())
        weights = {id(modules[layer].weight) for layer in self.found.layers}
        others = sum(p.numel() for p in self.model.parameters() if id(p) not in weights)
        for layer in self.found.layers:
            self._layer(layer, modules[layer])
        for index, numel in enumerate(self.found.additions):
            name = f"(addition {index})"
            self.tensors[name] = TensorInfo(
                name=name, role="addition", numel=numel, fixed_bits=FLOAT_BITS
            )
        if macs := self.found.unconverted_macs:
            name = "(unconverted)"
            self.layers.append(
                LayerInfo(name=name, kind="functional", macs=macs, weight=None, input=None)
            )
        return Graph(layers=tuple(self.layers), tensors=self.tensors, float_parameters=others)


def prepare(
    model: nn.Module,
    example_inputs: Any,
    config: QuantConfig | None = None,
    calibration: Iterable[Any] | Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Return a copy of `model` that learns bit-widths and truncation boundaries.

    Every convolution and linear layer quantizes its weight and its input. Layers that consume the
    same tensor share one quantizer for it.

    Args:
        model: any float module; it is not changed.
        example_inputs: arguments of one forward: a tensor, a tuple, or a dict of keywords. Shapes
            count: costs are those of these inputs, per sample.
        config: how to quantize.
        calibration: batches of inputs in the form of `example_inputs` (longer tuples, such as
            `(images, labels)`, are cut), or a function that runs the model on data itself.
            Default: the example inputs. Runs in eval mode and leaves random generators unchanged.

    Raises:
        UserError: the model is prepared already, does not run on the example, has nothing to
            quantize, a pin matches no layer or contradicts another, or calibration has no data.
    """
    config = config or QuantConfig()
    if any(isinstance(module, (QuantState, QuantLayer)) for module in model.modules()):
        raise UserError("the model is prepared already; prepare the float model")
    prepared = copy.deepcopy(model)
    for module in prepared.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fused inference kernel reads the float weights, past the quantizers.
            module.activation_relu_or_gelu = 0
    found = trace(prepared, example_inputs)
    if not found.layers:
        kinds = ", ".join(sorted(kind.__name__ for kind in LAYERS))
        raise UserError(f"the model has nothing to quantize: it runs none of {kinds}")
    builder = _Builder(prepared, found, config)
    graph = builder.build()
    setattr(prepared, STATE, QuantState(graph, config, builder.clock))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    prepared.to(device)
    calibrate(prepared, example_inputs, calibration)
    prepared.register_forward_pre_hook(_tick)
    return prepared


def calibrate(
    model: nn.Module,
    example_inputs: Any,
    calibration: Iterable[Any] | Callable[[nn.Module], None] | None,
) -> None:
    """Give every activation quantizer its grid and boundary; see `prepare`."""
    graph, config = quant_state(model).graph, quant_state(model).config
    found = quantizers(model)
    observers = {n: Observer() for n in found if graph.tensors[n].role == "activation"}
    for name, quantizer in found.items():
        # Weights stay in float meanwhile: boundaries come from the float model's activations.
        quantizer.observer = observers.get(name, _ignore)
    try:
        with unchanged_mode(model):
            if callable(calibration):
                calibration(model)
            else:
                wanted = len(as_arguments(example_inputs)[0])
                for batch in calibration if calibration is not None else (example_inputs,):
                    args, kwargs = as_arguments(batch)
                    model(*args[:wanted], **kwargs)
    finally:
        for quantizer in found.values():
            quantizer.observer = None
    if observers and not any(observer.samples for observer in observers.values()):
        raise UserError("calibration: no data went through the model; give at least one batch")
    for name, observer in observers.items():
        signed = found[name].bits.allowed[0] >= 2
        found[name].initialize(observer.statistics(config.activations.percentile, signed))


def _ignore(x: Tensor) -> None:
    """Observe nothing."""


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    lr_boundaries: float | None = None,
    lr_bits: float | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups: weights with and without decay, boundaries, bits.

    Neither 1-D parameters (biases, normalization) nor the quantizers' own are decayed.

    Args:
        model: a prepared model, wrapped or not.
        lr: rate of weights, and of the rest where nothing else is given.
        weight_decay: decay of weights with two or more dimensions.
        lr_boundaries: rate of truncation boundaries.
        lr_bits: rate of bit-widths.

    Returns:
        Groups with a `name`; the group of bits is missing once they are frozen.
    """
    own: dict[int, str] = {}
    for module in unwrap(model).modules():
        if isinstance(module, FakeQuantizer):
            own.update((id(p), "boundaries") for p in module.parameters(recurse=False))
        elif isinstance(module, BitWidth):
            own.update((id(p), "bits") for p in module.parameters(recurse=False))
    parts: dict[str, list[Tensor]] = {"decayed": [], "plain": [], "boundaries": [], "bits": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            default = "decayed" if parameter.dim() > 1 else "plain"
            parts[own.get(id(parameter), default)].append(parameter)
    rates = {"boundaries": lr_boundaries, "bits": lr_bits}
    return [
        {
            "name": name,
            "params": parameters,
            "lr": lr if rates.get(name) is None else rates[name],
            "weight_decay": weight_decay if name == "decayed" else 0.0,
        }
        for name, parameters in parts.items()
        if parameters
    ]


def freeze_bits(model: M, bits: Mapping[str, int] | None = None) -> M:
    """Freeze every bit-width, in place: to `bits` by tensor name, else to the nearest allowed."""
    for name, quantizer in quantizers(model).items():
        quantizer.freeze(None if bits is None else bits[name])
    return model
