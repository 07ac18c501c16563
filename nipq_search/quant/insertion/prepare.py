"""From a float model to one that learns its quantization: prepare, calibrate, group, freeze."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from nipq_search.errors import UserError
from nipq_search.quant.config import ActivationStart, QuantConfig
from nipq_search.quant.graph import Graph
from nipq_search.quant.insertion.build import Builder
from nipq_search.quant.insertion.groups import groups_of, tie
from nipq_search.quant.insertion.layers import LAYERS, QuantLayer
from nipq_search.quant.kernels.relu import make_lean
from nipq_search.quant.numerics.noise import NoiseClock
from nipq_search.quant.quantizers.base import FakeQuantizer
from nipq_search.quant.quantizers.bit_width import BitWidth
from nipq_search.quant.quantizers.statistics import Observer
from nipq_search.quant.tracing.flow import tensors_in
from nipq_search.quant.tracing.roles import IDLE
from nipq_search.quant.tracing.sites import Owner
from nipq_search.quant.tracing.trace import as_arguments, trace, unchanged_mode

STATE = "quant_state"
"""Name of the submodule that `prepare` adds."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

M = TypeVar("M", bound=nn.Module)


class QuantState(nn.Module):
    """Belongs to the root of a prepared model: its graph, its configuration, its noise clock.

    Seed and step of the clock are in the state dict, so that a resumed model continues with the
    noise that it would have seen.
    """

    def __init__(
        self,
        graph: Graph,
        config: QuantConfig,
        clock: NoiseClock,
        example_inputs: Any,
        sites: nn.ModuleDict,
    ) -> None:
        """Hold what `prepare` found."""
        super().__init__()
        self.sites = sites
        self.graph, self.config, self.clock = graph, config, clock
        args, kwargs = as_arguments(example_inputs)
        self.positional, self.keywords = len(args), tuple(kwargs)

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a forward in a batch, which may hold more, such as labels."""
        args, kwargs = as_arguments(batch)
        kept = {key: value for key, value in kwargs.items() if key in self.keywords}
        return args[: self.positional], kept

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
    while not _has_state(inner):  # `hasattr` sees through torch.compile's wrapper
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


def _has_state(module: nn.Module) -> bool:
    return STATE in module._modules or STATE in vars(module)


def attach_state(root: nn.Module, state: QuantState) -> None:
    """Make the state a child of the root.

    A container, such as `nn.Sequential`, would take it for a layer of its own: there it is a
    child of the first module inside that is none.
    """
    home = root
    if isinstance(root, CONTAINERS):
        home = next((m for m in root.modules() if not isinstance(m, CONTAINERS)), root)
    home.add_module(STATE, state)
    if home is not root:
        vars(root)[STATE] = state
        root.register_load_state_dict_pre_hook(_rename_state)  # type: ignore[no-untyped-call]
    root.register_load_state_dict_post_hook(_tie_again)  # type: ignore[no-untyped-call]


def _rename_state(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Load pre-hook: version 0.1 had the state of a container among its layers."""
    old = f"{prefix}{STATE}._extra_state"
    if old in state:
        names = {id(m): name for name, m in module.named_modules()}
        state[f"{prefix}{names[id(quant_state(module))]}._extra_state"] = state.pop(old)


def _tie_again(module: nn.Module, incompatible: Any) -> None:
    """Load post-hook: a load may have given the members of a group new parameters."""
    tie(groups_of(quant_state(module).graph.tensors), quantizers(module))


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
        clock: NoiseClock = getattr(module, STATE).clock
        if torch.compiler.is_compiling():
            clock.count.add_(1)
        else:
            clock.step += 1


@torch.inference_mode(False)  # parameters that are made under it could never be trained
def prepare(
    model: nn.Module,
    example_inputs: Any,
    config: QuantConfig | None = None,
    calibration: Iterable[Any] | Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Return a copy of `model` that learns bit-widths and truncation boundaries.

    Every multiplication by a weight quantizes the weight and the other operand, every product of
    two activations both of them, every embedding its table: in layers of torch and wherever else
    the model's own code multiplies. Layers that consume the same tensor share one quantizer for
    it, and so do layers that share a weight. What stays in float is in `profile`, with the reason.
    Quantizers have float32 parameters; in a model of float64 alone they have those.

    Args:
        model: any float module; it is not changed.
        example_inputs: arguments of one forward: a tensor, a tuple, or a dict of keywords. Shapes
            count: costs are those of these inputs, per sample.
        config: how to quantize.
        calibration: batches of inputs in the form of `example_inputs` (what is more in them, such
            as the labels of `(images, labels)`, is left out), or a function that runs the model on
            data itself. Default: the example inputs. Runs in eval mode and leaves random
            generators unchanged.

    Raises:
        UserError: the model is prepared already, has lazy, meta, complex or integer parameters,
            does not run on the example, has nothing to quantize, a pattern matches no layer or
            contradicts another, or calibration has no data.
    """
    config = config or QuantConfig()
    check_model(model, example_inputs)
    prepared = copy_model(model)
    for module in prepared.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fused inference kernel reads the float weights, past the quantizers.
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            # So do nested tensors, which its padding mask would make.
            module.enable_nested_tensor = module.use_nested_tensor = False
    before = set(prepared.modules())
    found = trace(prepared, example_inputs)
    if set(prepared.modules()) != before:  # it replaced some of its modules on the way
        found = trace(prepared, example_inputs)
    builder = Builder(prepared, found, config)
    graph, sites = builder.build()
    if not any(layer.macs for layer in graph.layers):
        kinds = ", ".join(sorted(kind.__name__ for kind in LAYERS))
        raise UserError(f"the model has nothing to quantize: it runs none of {kinds}")
    warn_of_float_work(graph)
    make_lean(prepared)
    attach_state(prepared, QuantState(graph, config, builder.clock, example_inputs, sites))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    prepared.to(device)
    floats = [p for p in model.parameters() if p.is_floating_point()]
    if floats and all(p.dtype is torch.float64 for p in floats):
        for quantizer in quantizers(prepared).values():
            quantizer.double()
    calibrate(prepared, (example_inputs,) if calibration is None else calibration)
    prepared.register_forward_pre_hook(_tick)
    return prepared


def copy_model(model: M) -> M:
    """A deep copy; results that modules keep from earlier forwards are copied without history."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for x in tensors_in(vars(module)):
            if not x.is_leaf:
                memo[id(x)] = x.detach().clone()
    return copy.deepcopy(model, memo)


def check_model(model: nn.Module, example_inputs: Any) -> None:
    """Raise `UserError` for a model that cannot be prepared."""
    if any(isinstance(module, (QuantState, QuantLayer, Owner)) for module in model.modules()):
        raise UserError("the model is prepared already; prepare the float model")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedTensorMixin):
            raise UserError(f"{name}: a lazy module; run the model once on a batch before prepare")
        if tensor.is_inference():
            raise UserError(
                f"{name}: made under torch.inference_mode; make the model outside of it"
            )
        if tensor.is_meta:
            raise UserError(f"{name}: on the meta device; load the weights before prepare")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UserError(f"{name}: {kind} parameters cannot be quantized; use float32")
    for x in tensors_in(example_inputs):
        if x.is_complex():
            raise UserError(
                "example_inputs: complex numbers cannot be quantized; give real and imaginary "
                "parts as channels"
            )


def warn_of_float_work(graph: Graph) -> None:
    """Warn of multiplications that stay in float though nobody asked for it."""
    idle = [layer.name for layer in graph.layers if layer.why == IDLE]
    if idle:
        warnings.warn(
            f"{_some(idle)} did not run on the example inputs and stay in float; "
            "give an example that reaches them",
            stacklevel=3,
        )
    left = [layer for layer in graph.layers if layer.why and layer.macs and not layer.asked]
    if left:
        total = sum(layer.macs for layer in graph.layers)
        share = 100 * sum(layer.macs for layer in left) / total
        reasons = _some([f"{layer.name}: {layer.why}" for layer in left])
        warnings.warn(
            f"{share:.2g} % of the multiplications stay in float and count 32 x 32 bits "
            f"({reasons}; see `profile`)",
            stacklevel=3,
        )


def _some(texts: Sequence[str]) -> str:
    """The first three of `texts`, and how many more there are."""
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return ", ".join(texts[:3]) + more


def calibrate(model: nn.Module, calibration: Iterable[Any] | Callable[[nn.Module], None]) -> None:
    """Give every activation quantizer its grid and boundary; see `prepare`."""
    config = quant_state(model).config
    found = quantizers(model)
    observers = {n: Observer() for n, q in found.items() if q.role != "weight"}
    for name, quantizer in found.items():
        # Weights stay in float meanwhile: boundaries come from the float model's activations.
        quantizer.observer = observers.get(name, _ignore)
    try:
        with unchanged_mode(model):
            if callable(calibration):
                calibration(model)
            else:
                for batch in calibration:
                    args, kwargs = quant_state(model).arguments(batch)
                    model(*args, **kwargs)
    finally:
        for quantizer in found.values():
            quantizer.observer = None
    if observers and not any(observer.samples for observer in observers.values()):
        raise UserError("calibration: no data went through the model; give at least one batch")
    unseen = [name for name, observer in observers.items() if not observer.samples]
    if unseen:
        warnings.warn(
            f"calibration did not reach {_some(unseen)}: their boundaries start at "
            "1; give batches that do",
            stacklevel=3,
        )
    for name, observer in observers.items():
        signed = found[name].bits.allowed[0] >= 2
        mse = config.activations.start is ActivationStart.MSE
        found[name].initialize(observer.statistics(config.activations.percentile, signed, mse))


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
