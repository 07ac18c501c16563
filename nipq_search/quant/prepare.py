"""From a float model to one that learns its quantization: prepare, calibrate, group, freeze."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nipq_search.errors import UserError, nearest
from nipq_search.quant.bit_width import BitWidth
from nipq_search.quant.config import FLOAT, Granularity, QuantConfig, Start
from nipq_search.quant.graph import FLOAT_BITS, Graph, LayerInfo, TensorInfo
from nipq_search.quant.layers import LAYERS, QuantLayer, convert
from nipq_search.quant.noise import NoiseClock
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
    while not hasattr(inner, STATE):
        if isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise UserError("the model is not prepared: call nipq_search.prepare(model, ...) first")
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
        self.activations: dict[Any, FakeQuantizer] = {}
        self.count = 0
        pins = {name: config.pin_of(name) for name in found.layers}
        for pattern in config.pin:
            if not any(QuantConfig(pin={pattern: FLOAT}).pin_of(name) for name in found.layers):
                hint = nearest(pattern.strip("*"), found.layers)
                raise UserError(f"quant.pin.{pattern}: no layer has such a name{hint}")
        self.pins = pins
        self.shared: dict[Any, list[str]] = {}
        for name, call in found.layers.items():
            self.shared.setdefault(self._key(name), []).append(name)
            del call

    def _key(self, layer: str) -> Any:
        """Layers with equal keys consume the same tensor; a layer called twice has its own."""
        inputs = set(self.found.layers[layer].inputs)
        return inputs.pop() if len(inputs) == 1 else layer

    def _quantizer(self, name: str, allowed: tuple[int, ...], channels: int) -> FakeQuantizer:
        kind = QUANTIZERS[self.config.quantizer]
        bits = BitWidth(allowed, self.config.start_bits, learned=kind.learns_bits)
        quantizer = kind(name, bits, channels, self.clock, self.count, self.config.proxy.value)
        self.count += 1
        return quantizer

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

    def _activation(self, layer: str) -> FakeQuantizer | None:
        key = self._key(layer)
        if key in self.activations:
            return self.activations[key]
        call = self.found.layers[layer]
        raw = set(call.inputs) <= self.found.raw
        name = f"{layer}.input"
        if raw and self.config.input_bits is not None:
            self.tensors.setdefault(
                name,
                TensorInfo(
                    name=name,
                    role="activation",
                    numel=call.input_numel,
                    fixed_bits=self.config.input_bits,
                ),
            )
            return None
        pins = {
            self.pins[n] for n in self.shared[key] if self.pins[n] not in (None, FLOAT)
        }
        if len(pins) > 1:
            raise UserError(
                f"quant.pin: {', '.join(self.shared[key])} consume the same tensor and are pinned "
                "to different bit-widths; pin them alike"
            )
        allowed = (int(pins.pop() or 0),) if pins else self.config.activations.bits
        quantizer = self._quantizer(name, allowed, 1)
        self.tensors[name] = TensorInfo(
            name=name, role="activation", numel=call.input_numel, scales=1, allowed=allowed
        )
        self.activations[key] = quantizer
        return quantizer

    def _float_input(self, layer: str) -> str:
        name = f"{layer}.input"
        numel = self.found.layers[layer].input_numel
        self.tensors[name] = TensorInfo(
            name=name, role="activation", numel=numel, fixed_bits=FLOAT_BITS
        )
        return name

    def build(self) -> Graph:
        """Convert every layer in place and return the graph."""
        modules = dict(self.model.named_modules())
        for layer, call in self.found.layers.items():
            module = modules[layer]
            kind = LAYERS[type(module)].kind
            if self.pins[layer] == FLOAT:
                weight = f"{layer}.weight"
                numel = module.weight.numel()  # type: ignore[union-attr,operator]
                self.tensors[weight] = TensorInfo(
                    name=weight, role="weight", numel=numel, fixed_bits=FLOAT_BITS
                )
                source = self._float_input(layer)
            else:
                activation = self._activation(layer)
                convert(module, self._weight(layer, module), activation)
                weight = f"{layer}.weight"
                source = activation.name if activation is not None else f"{layer}.input"
            self.layers.append(
                LayerInfo(name=layer, kind=kind, macs=call.macs, weight=weight, input=source)
            )
        for index, numel in enumerate(self.found.additions):
            name = f"addition{index}"
            self.tensors[name] = TensorInfo(
                name=name, role="addition", numel=numel, fixed_bits=FLOAT_BITS
            )
        if self.found.unconverted_macs:
            macs = self.found.unconverted_macs
            name = "(unconverted)"
            self.layers.append(
                LayerInfo(name=name, kind="functional", macs=macs, weight=None, input=None)
            )
        weights = sum(t.numel for t in self.tensors.values() if t.role == "weight")
        scales = {id(p) for q in self.model.modules() if isinstance(q, FakeQuantizer)
                  for p in q.parameters()}
        total = sum(p.numel() for p in self.model.parameters() if id(p) not in scales)
        return Graph(
            layers=tuple(self.layers), tensors=self.tensors, float_parameters=total - weights
        )


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
            `(images, labels)`, are cut), or a function that runs the model on data itself. Default:
            the example inputs. Runs in eval mode and leaves random generators unchanged.

    Raises:
        UserError: the model is prepared already, does not run on the example, has nothing to
            quantize, or a pin matches no layer.
    """
    config = config or QuantConfig()
    if any(isinstance(module, (QuantState, QuantLayer)) for module in model.modules()):
        raise UserError("the model is prepared already; prepare the float model")
    prepared = copy.deepcopy(model)
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
    config = quant_state(model).config
    observed = {n: q for n, q in quantizers(model).items() if n.endswith(".input")}
    for quantizer in observed.values():
        quantizer.observer = Observer()
    # Weights stay in float meanwhile: boundaries come from the float model's activations.
    weights = [q for n, q in quantizers(model).items() if n not in observed]
    for quantizer in weights:
        quantizer.observer = Observer(samples=[])
    try:
        with unchanged_mode(model):
            if callable(calibration):
                calibration(model)
            else:
                wanted = len(as_arguments(example_inputs)[0])
                for batch in calibration if calibration is not None else (example_inputs,):
                    args, kwargs = as_arguments(batch)
                    model(*args[:wanted], **kwargs)
        for quantizer in observed.values():
            observer = quantizer.observer
            assert observer is not None
            signed = quantizer.bits.allowed[0] >= 2
            quantizer.initialize(observer.statistics(config.activations.percentile, signed))
    finally:
        for quantizer in [*observed.values(), *weights]:
            quantizer.observer = None


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


def layer_bits(model: nn.Module) -> Iterator[tuple[LayerInfo, int, int]]:
    """Every layer with the hard bit-widths of its weight and its input."""
    graph = quant_state(model).graph
    hard = {name: quantizer.bits.hard() for name, quantizer in quantizers(model).items()}

    def bits(tensor: str | None) -> int:
        if tensor is None:
            return FLOAT_BITS
        return hard.get(tensor, graph.tensors[tensor].fixed_bits or FLOAT_BITS)

    for layer in graph.layers:
        yield layer, bits(layer.weight), bits(layer.input)
