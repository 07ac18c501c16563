"""One float forward that finds out what a model multiplies, and with which tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nipq_search.errors import UserError
from nipq_search.quant.layers import LAYERS

TensorKey = tuple[int, int, int, tuple[tuple[int, int], ...]]
"""Identity of a tensor's values: storage, version, elements, and where they lie if with gaps.
Reshaped and permuted views keep it."""


@dataclass
class LayerCall:
    """What one layer did in the traced forward, summed over its calls."""

    macs: int = 0
    inputs: list[TensorKey] = field(default_factory=list)
    input_numel: int = 0


@dataclass
class Trace:
    """What the forward showed.

    Attributes:
        layers: calls of every layer that can be converted, in order of execution.
        raw: keys of the model's own inputs.
        additions: elements per sample of every sum of two activations.
        unconverted_macs: multiply-accumulates per sample outside those layers.
        batch: samples in the example.
    """

    layers: dict[str, LayerCall] = field(default_factory=dict)
    raw: set[TensorKey] = field(default_factory=set)
    additions: list[int] = field(default_factory=list)
    unconverted_macs: int = 0
    batch: int = 1


def tensor_key(x: Tensor) -> TensorKey:
    """Identity of the values of `x`, while its storage lives."""
    axes = tuple(sorted((t, s) for s, t in zip(x.shape, x.stride(), strict=True) if s > 1))
    dense = 1 + sum((size - 1) * stride for stride, size in axes) == x.numel()
    start = x.untyped_storage().data_ptr() + int(x.storage_offset())
    return (start, x._version, x.numel(), () if dense else axes)


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a forward from a tensor, a tuple or a dict."""
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


class _Additions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes sums of two tensors of equal shape that are no parameters: residual additions."""

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = parameters
        self.numels: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        packet = getattr(func, "overloadpacket", None)
        if packet in (torch.ops.aten.add, torch.ops.aten.add_) and len(args) > 1:
            a, b = args[0], args[1]
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
                known = a.data_ptr() in self.parameters or b.data_ptr() in self.parameters
                if a.dim() > 1 and a.is_floating_point() and not known:
                    self.numels.append(a.numel())
        return func(*args, **(kwargs or {}))


@contextmanager
def unchanged_mode(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients and leave modes and random generators as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention and recurrent layers as the products they are: fused kernels count nothing."""
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # `backends.mkldnn.flags` warns about Intel's GPUs
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


def trace(model: nn.Module, example_inputs: Any) -> Trace:
    """Run `model` once on the example and note what it multiplies.

    Raises:
        UserError: the model does not run on the example inputs, or they hold no tensor.
    """
    result = Trace()
    examples = list(tensors_in(example_inputs))
    if not examples:
        raise UserError("example_inputs: no tensor in it; give the arguments of one forward")
    result.batch = max(1, examples[0].shape[0] if examples[0].dim() else 1)
    result.raw = {tensor_key(x) for x in examples}
    # Keys are addresses: keeping every tensor alive keeps them distinct.
    alive: list[Any] = list(examples)
    counters: dict[str, LayerCall] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            alive.extend((x, out))
            call = counters.setdefault(name, LayerCall())
            per_output = module.weight[0].numel()
            call.macs += out.numel() * per_output // result.batch
            call.inputs.append(tensor_key(x))
            call.input_numel = max(call.input_numel, x.numel() // result.batch)

        return note

    handles = []
    for name, module in model.named_modules():
        if type(module) in LAYERS:
            handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
    args, kwargs = as_arguments(example_inputs)
    additions = _Additions({p.data_ptr() for p in model.parameters()})
    flops = FlopCounterMode(display=False)
    try:
        with unchanged_mode(model), _plain_kernels(), additions, flops:
            model(*args, **kwargs)
    except Exception as error:
        raise UserError(
            f"example_inputs: the model does not run on them: {str(error).splitlines()[0]}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    result.layers = counters
    result.additions = [numel // result.batch for numel in additions.numels]
    total = flops.get_total_flops() // 2 // result.batch
    result.unconverted_macs = max(0, total - sum(call.macs for call in counters.values()))
    if result.unconverted_macs:
        share = 100 * result.unconverted_macs / total
        warnings.warn(
            f"{share:.2g} % of the multiplications are outside layers that can be quantized; "
            "they stay in float and count 32 x 32 bits (see `profile`)",
            stacklevel=3,
        )
    return result
