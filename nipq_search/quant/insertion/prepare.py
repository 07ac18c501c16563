"""Conversion of a float model into one with learned quantization: prepare, calibrate, freeze."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from nipq_search.quant.quantizers.statistics import Observer
from nipq_search.quant.tracing.flow import tensors_in
from nipq_search.quant.tracing.roles import IDLE
from nipq_search.quant.tracing.sites import Owner
from nipq_search.quant.tracing.trace import as_arguments, eval_without_grad, trace

STATE = "quant_state"
"""Name of the submodule that `prepare` adds to a model."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

M = TypeVar("M", bound=nn.Module)


class QuantState(nn.Module):
    """Graph, configuration and noise clock of a prepared model, attached to its root.

    The state dict contains the clock's seed and step, so a model that is loaded from a checkpoint
    continues the same noise sequence.
    """

    def __init__(
        self,
        graph: Graph,
        config: QuantConfig,
        clock: NoiseClock,
        example_inputs: Any,
        sites: nn.ModuleDict,
    ) -> None:
        """Store the results of `prepare`.

        Args:
            graph: layers and tensors of the model.
            config: settings with which the model was prepared.
            clock: noise clock shared by all quantizers of the model.
            example_inputs: arguments of one forward call; they define which entries of a batch are
                inputs of the model.
            sites: quantized sites of modules that are not converted as a whole, by owner.
        """
        super().__init__()
        self.sites = sites
        self.graph, self.config, self.clock = graph, config, clock
        args, kwargs = as_arguments(example_inputs)
        self.positional, self.keywords = len(args), tuple(kwargs)

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the forward arguments contained in a batch, without extras such as labels."""
        args, kwargs = as_arguments(batch)
        kept = {key: value for key, value in kwargs.items() if key in self.keywords}
        return args[: self.positional], kept

    def forward(self, x: Any) -> Any:
        """Return `x` unchanged, because a parent such as `nn.Sequential` calls every child."""
        return x

    def get_extra_state(self) -> dict[str, int]:
        """Return the seed and step of the noise clock."""
        return {"seed": self.clock.seed, "step": self.clock.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the seed and step of the noise clock."""
        self.clock.seed, self.clock.step = state["seed"], state["step"]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the prepared module: `model`, or the one in its DDP, compile or EMA wrappers.

    Raises:
        UserError: the model was not prepared.
    """
    inner: Any = model
    while not _has_state(inner):  # `hasattr` would look through torch.compile's wrapper
        if isinstance(getattr(inner, "_orig_mod", None), nn.Module):  # set by torch.compile
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise UserError("the model is not prepared: call nipq_search.prepare first")
    return inner  # type: ignore[no-any-return]


def quant_state(model: nn.Module) -> QuantState:
    """Return the quantization state of a prepared, possibly wrapped, model.

    Raises:
        UserError: the model was not prepared.
    """
    return getattr(unwrap(model), STATE)  # type: ignore[no-any-return]


def _has_state(module: nn.Module) -> bool:
    return STATE in module._modules or STATE in vars(module)


def attach_state(root: nn.Module, state: QuantState) -> None:
    """Attach the quantization state to the root, with hooks for loading a state dict.

    A container such as `nn.Sequential` would treat the state as one of its layers, so the state
    becomes a child of the first non-container module inside it instead.
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
    """Load pre-hook for version 0.1 checkpoints, where the state was a child of the container."""
    old = f"{prefix}{STATE}._extra_state"
    if old in state:
        names = {id(m): name for name, m in module.named_modules()}
        state[f"{prefix}{names[id(quant_state(module))]}._extra_state"] = state.pop(old)


def _tie_again(module: nn.Module, incompatible: Any) -> None:
    """Load post-hook: share theta again, because loading may create new parameters in a group."""
    tie(groups_of(quant_state(module).graph.tensors), quantizers(module))


def quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Return every quantizer of a prepared model, keyed by tensor name."""
    found = (m for m in unwrap(model).modules() if isinstance(m, FakeQuantizer))
    return {quantizer.name: quantizer for quantizer in found}


def is_frozen(model: nn.Module) -> bool:
    """Whether all bit-widths are frozen."""
    return all(quantizer.bits.is_frozen for quantizer in quantizers(model).values())


def _tick(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of the root: advance the noise clock in training mode."""
    if module.training:
        clock: NoiseClock = getattr(module, STATE).clock
        if torch.compiler.is_compiling():
            clock.count.add_(1)
        else:
            clock.step += 1


@torch.inference_mode(False)  # parameters created in inference mode cannot be trained
def prepare(
    model: nn.Module,
    example_inputs: Any,
    config: QuantConfig | None = None,
    calibration: Iterable[Any] | Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Return a copy of `model` that learns bit-widths and truncation boundaries.

    Both operands are quantized in multiplications by a weight and in products of two activations,
    as is the table of an embedding. This applies to torch layers as well as functional calls in
    the model's own code. Layers that consume the same tensor share one quantizer for it, as do
    layers that share a weight. `profile` lists the layers that stay in float, with the reasons.
    Quantizer parameters are float32, or float64 if all float parameters of the model are
    float64.

    Args:
        model: any float module; it is not modified.
        example_inputs: arguments of one forward call: a tensor, a tuple, or a dict of keyword
            arguments. Their shapes determine the costs, which are reported per sample; the first
            dimension of the first tensor is the number of samples.
        config: quantization settings. Default: `QuantConfig()`.
        calibration: batches in the format of `example_inputs` (additional entries, such as the
            labels in `(images, labels)`, are ignored), or a function that runs the model on
            data. Default: the example inputs. Calibration runs in eval mode and leaves random
            generators unchanged.

    Returns:
        The prepared model, a deep copy on the same device.

    Raises:
        UserError: the model is already prepared, cannot be quantized (see `check_model`), does not
            run on the example inputs or has nothing to quantize; a layer pattern matches no layer
            or contradicts another; or there is no calibration data.

    Example:
        >>> import torch
        >>> from nipq_search import prepare
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> images = torch.rand(16, 8)
        >>> prepared = prepare(model, images)
        >>> prepared(images).shape
        torch.Size([16, 2])
    """
    config = config or QuantConfig()
    check_model(model, example_inputs)
    prepared = copy_model(model)
    for module in prepared.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # The fused inference kernel would read the float weights and bypass the quantizers.
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            # Nested tensors, which a padding mask would create, bypass them as well.
            module.enable_nested_tensor = module.use_nested_tensor = False
    before = set(prepared.modules())
    found = trace(prepared, example_inputs)
    if set(prepared.modules()) != before:  # the forward pass replaced some modules
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
    """Return a deep copy of a model.

    In the copy, tensors that earlier forward passes cached have no autograd graph.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for x in tensors_in(vars(module)):
            if not x.is_leaf:
                memo[id(x)] = x.detach().clone()
    return copy.deepcopy(model, memo)


def check_model(model: nn.Module, example_inputs: Any) -> None:
    """Check that a model can be prepared.

    Raises:
        UserError: the model is already prepared; a parameter or buffer is lazy, on the meta device
            or created in inference mode; a parameter is complex or an integer; or an example input
            is complex.
    """
    if any(isinstance(module, (QuantState, QuantLayer, Owner)) for module in model.modules()):
        raise UserError("the model is already prepared; prepare the float model")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedTensorMixin):
            raise UserError(
                f"{name}: belongs to a lazy module; run the model once on a batch before prepare"
            )
        if tensor.is_inference():
            raise UserError(
                f"{name}: created under torch.inference_mode; create the model outside of it"
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
                "example_inputs: complex numbers cannot be quantized; pass real and imaginary "
                "parts as channels"
            )


def warn_of_float_work(graph: Graph) -> None:
    """Warn about layers that did not run on the example inputs, or that stay in float.

    Layers that the configuration keeps in float are not mentioned.
    """
    idle = [layer.name for layer in graph.layers if layer.float_reason == IDLE]
    if idle:
        warnings.warn(
            f"{_some(idle)} did not run on the example inputs and stay in float; "
            "pass example inputs that reach them",
            stacklevel=3,
        )
    left = [
        layer
        for layer in graph.layers
        if layer.float_reason and layer.macs and not layer.float_requested
    ]
    if left:
        total = sum(layer.macs for layer in graph.layers)
        share = 100 * sum(layer.macs for layer in left) / total
        reasons = _some([f"{layer.name}: {layer.float_reason}" for layer in left])
        warnings.warn(
            f"{share:.2g} % of the multiplications stay in float and count as 32 x 32 bits "
            f"({reasons}; see `profile`)",
            stacklevel=3,
        )


def _some(texts: Sequence[str]) -> str:
    """Return the first three of `texts`, followed by the number of the remaining ones."""
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return ", ".join(texts[:3]) + more


@contextmanager
def observing(
    model: nn.Module, observers: Mapping[str, Callable[[Tensor], None]]
) -> Iterator[None]:
    """Within the context, pass tensors to observers and run the model in float.

    All quantizers are bypassed, so the observed values are those of the float model.

    Args:
        model: a prepared model.
        observers: functions that receive a tensor, by tensor name; not every tensor needs one.
    """
    found = quantizers(model)
    for name, quantizer in found.items():
        quantizer.observer = observers.get(name, _ignore)
    try:
        yield
    finally:
        for quantizer in found.values():
            quantizer.observer = None


def _ignore(x: Tensor) -> None:
    """Observe nothing; the quantizer passes its tensor through."""


def calibrate(model: nn.Module, calibration: Iterable[Any] | Callable[[nn.Module], None]) -> None:
    """Initialize every activation quantizer by running the float model on calibration data.

    Quantizers that the data do not reach start with a boundary of 1, and a warning is emitted.

    Raises:
        UserError: no data went through the model.
    """
    config = quant_state(model).config
    found = quantizers(model)
    observers = {n: Observer() for n, q in found.items() if not q.is_weight}
    with observing(model, observers), eval_without_grad(model):
        if callable(calibration):
            calibration(model)
        else:
            for batch in calibration:
                args, kwargs = quant_state(model).arguments(batch)
                model(*args, **kwargs)
    if observers and not any(observer.samples for observer in observers.values()):
        raise UserError("calibration: no data went through the model; pass at least one batch")
    unseen = [name for name, observer in observers.items() if not observer.samples]
    if unseen:
        warnings.warn(
            f"calibration did not reach {_some(unseen)}: their boundaries start at 1; "
            "pass batches that reach them",
            stacklevel=3,
        )
    for name, observer in observers.items():
        signed = found[name].bits.allowed[0] >= 2
        mse = config.activations.start is ActivationStart.MSE
        found[name].initialize(observer.statistics(config.activations.percentile, signed, mse))


def freeze_bits(model: M, bits: Mapping[str, int] | None = None) -> M:
    """Freeze every bit-width in place: at `bits` by tensor name, or at the nearest allowed width.

    Returns:
        The same model.

    Raises:
        UserError: a bit-width is not allowed for its tensor, or differs from its frozen one.
    """
    for name, quantizer in quantizers(model).items():
        quantizer.freeze(None if bits is None else bits[name])
    return model
