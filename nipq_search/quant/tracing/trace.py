"""Tracing of one float forward pass to find the multiplications of a model and their operands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from nipq_search.errors import UserError
from nipq_search.quant.tracing.flow import (
    LAYER,
    PARAMETER,
    SUM,
    Flow,
    Origins,
    TensorKey,
    tensor_key,
    tensors_in,
)
from nipq_search.quant.tracing.ops import DECOMPOSED, DECOMPOSED_KINDS, Op, op_of
from nipq_search.quant.tracing.sites import ParameterLocation, ParameterTable


@dataclass(frozen=True, kw_only=True)
class OperandRecord:
    """Operand of one execution of a traced call.

    Attributes:
        key: identity of the operand's values.
        shape: shape, including the batch dimension.
        origins: origins of the operand's values; see `flow.Flow`.
        parameter: name of the parameter if the operand is a whole parameter, possibly as a view;
            otherwise None.
        value: the tensor itself if the operand is a weight, otherwise None.
        raw: whether the operand contains only values of the model's inputs, possibly moved or
            padded.
        trained: whether the operand is computed from a parameter that requires gradients.
    """

    key: TensorKey
    shape: tuple[int, ...]
    origins: Origins
    parameter: str | None
    value: Tensor | None
    raw: bool
    trained: bool

    @property
    def numel(self) -> int:
        """Number of elements in the whole batch."""
        return int(torch.Size(self.shape).numel())

    @property
    def is_activation(self) -> bool:
        """Whether the operand depends on the model's inputs."""
        return any(not origin.startswith(PARAMETER) for origin in self.origins)

    @property
    def is_weight(self) -> bool:
        """Whether the operand is computed from parameters and does not depend on inputs."""
        return bool(self.origins) and not self.is_activation


@dataclass
class Call:
    """A site of the model: one call in one module, which may be executed several times.

    Attributes:
        owner: name of the innermost module whose forward method made the call.
        op: the called function; None if it has no quantized form.
        function: kind of the function in `ops.OPS` or, if it has no quantized form, its name.
        label: label of the parameter that the call multiplies by, or an empty string; see
            `sites.ParameterTable`.
        ordinal: index among the calls of its kind and parameter in the owner's forward method.
        operands: both operands of every execution.
        macs: multiply-accumulates of the whole batch, summed over all executions.
        outputs: number of elements of the largest result, including the batch dimension.
    """

    owner: str
    op: Op | None
    function: str
    label: str
    ordinal: int
    operands: list[tuple[OperandRecord | None, OperandRecord | None]] = field(default_factory=list)
    macs: int = 0
    outputs: int = 0

    @property
    def origin(self) -> str:
        """Name of the call as an origin in `Flow`."""
        kind = self.op.kind if self.op else self.function
        head = SUM if self.op is not None and self.op.is_sum else LAYER
        return f"{head}{self.owner}/{kind}/{self.label}/{self.ordinal}"


@dataclass
class Trace:
    """Result of tracing one forward pass.

    Attributes:
        calls: all sites, in order of execution.
        inside: names of the modules that enclose each module that ran, by its name.
        unseen_macs: multiply-accumulates outside the recorded calls, as in TorchScript or
            compiled code.
        batch: number of samples in the example inputs.
    """

    calls: list[Call] = field(default_factory=list)
    inside: dict[str, set[str]] = field(default_factory=dict)
    unseen_macs: int = 0
    batch: int = 1


class _Recorder(TorchFunctionMode):
    """Records every call that multiplies, with the module that made it."""

    def __init__(self, flow: Flow, model: nn.Module) -> None:
        super().__init__()
        self.flow = flow
        self.names = {id(module): name for name, module in model.named_modules()}
        self.parameters = ParameterTable(parameter_locations(model))
        self.trained = {PARAMETER + n for n, p in model.named_parameters() if p.requires_grad}
        self.calls: dict[tuple[str, str, str, int], Call] = {}
        self.stack: list[tuple[str, dict[tuple[str, str], int]]] = []
        self.inside: dict[str, set[str]] = {}
        self.kinds: frozenset[str] | None = None

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: attribute the following calls to this module."""
        name = self.names[id(module)]
        self.inside.setdefault(name, set()).update(around for around, _ in self.stack)
        self.stack.append((name, {}))

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """Forward hook: attribute the following calls to the enclosing module again."""
        self.stack.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DECOMPOSED:
            before, self.kinds = self.kinds, DECOMPOSED_KINDS
            try:
                with self:
                    return DECOMPOSED[func](*args, **kwargs)
            finally:
                self.kinds = before
        op = op_of(func, args, kwargs)
        if op is not None and self.kinds is not None and op.kind not in self.kinds:
            return func(*args, **kwargs)
        operands = (None, None) if op is None else self._operands(op, args, kwargs)
        label = "" if op is None else self.parameters.label_of_call(op, args, kwargs)
        before_flops = self.flow.flops
        out = func(*args, **kwargs)
        macs = (self.flow.flops - before_flops) // 2
        if self.stack and (op is not None or macs):
            self._note(op, func, label, operands, macs, out)
        return out

    def _operands(
        self, op: Op, args: Any, kwargs: Any
    ) -> tuple[OperandRecord | None, OperandRecord | None]:
        first = op.first.of(args, kwargs) if op.first is not None else None
        return self._operand(first), self._operand(op.second.of(args, kwargs))

    def _operand(self, x: Any) -> OperandRecord | None:
        strided = isinstance(x, Tensor) and x.layout is torch.strided
        if not strided or not x.is_floating_point():
            return None
        key, origins = tensor_key(x), self.flow.of(x)
        weight = bool(origins) and all(o.startswith(PARAMETER) for o in origins)
        return OperandRecord(
            key=key,
            shape=tuple(x.shape),
            origins=origins,
            parameter=self._whole_parameter(x),
            value=x.detach() if weight else None,
            raw=self.flow.is_raw(x),
            trained=bool(self.trained & origins),
        )

    def _whole_parameter(self, x: Tensor) -> str | None:
        """Return the name of the parameter that `x` equals as a whole, or None."""
        label = self.parameters.label(x)
        return label if label and "@" not in label else None

    def _note(
        self, op: Op | None, func: Any, label: str, operands: Any, macs: int, out: Any
    ) -> None:
        owner, counts = self.stack[-1]
        kind = op.kind if op is not None else getattr(func, "__name__", str(func))
        # Calls without a quantized form are counted separately, because sites do not count them.
        counted = (kind if op is not None else f"{kind} in float", label)
        ordinal = counts.get(counted, 0)
        counts[counted] = ordinal + 1
        call = self.calls.setdefault(
            (owner, *counted, ordinal),
            Call(owner=owner, op=op, function=kind, label=label, ordinal=ordinal),
        )
        call.macs += macs
        call.operands.append(operands)
        results = [x for x in tensors_in(out) if x.layout is torch.strided]
        call.outputs = max([call.outputs, *(x.numel() for x in results)])
        activation = any(operand is not None and operand.is_activation for operand in operands)
        if activation and (macs or (op is not None and op.is_sum and all(operands))):
            for x in results:
                self.flow.set(x, frozenset({call.origin}))


@contextmanager
def eval_without_grad(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode without gradients, then restore the training modes and RNG states.

    The RNG states are those of PyTorch on the CPU and on the GPUs that hold the model.
    """
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
def plain_kernels() -> Iterator[None]:
    """Within the context, run attention and recurrent layers as separate matrix products.

    The FLOP counter does not cover the fused kernels.
    """
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # The public `backends.mkldnn.flags` emits a warning about Intel's GPUs.
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


def parameter_locations(model: nn.Module) -> list[ParameterLocation]:
    """Return the location of every parameter of a model; a shared one is listed once."""
    locations: list[ParameterLocation] = []
    for name, _ in model.named_parameters():
        owner, _, key = name.rpartition(".")
        locations.append(ParameterLocation(name, model.get_submodule(owner), key))
    return locations


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert a tensor, sequence or mapping to the positional and keyword arguments of a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def trace(model: nn.Module, example_inputs: Any) -> Trace:
    """Run `model` once on the example inputs and record its multiplications.

    Raises:
        UserError: the model does not run on the example inputs, or they contain no tensors.
    """
    examples = list(tensors_in(example_inputs))
    if not examples:
        raise UserError(
            "example_inputs: contains no tensors; pass the arguments of one forward call"
        )
    batch = max(1, examples[0].shape[0] if examples[0].dim() else 1)
    flow = Flow()
    recorder = _Recorder(flow, model)
    for name, tensor in model.named_parameters():
        flow.set(tensor, frozenset({PARAMETER + name}))
    for x in examples:
        flow.set_raw(x)
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(recorder.enter))
        # Runs before other hooks, whose computations belong to the enclosing module.
        handles.append(
            module.register_forward_hook(recorder.leave, prepend=True, always_call=True)
        )
    args, kwargs = as_arguments(example_inputs)
    try:
        with eval_without_grad(model), plain_kernels(), flow, recorder:
            model(*args, **kwargs)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"example_inputs: the model does not run on them ({type(error).__name__}: {reason}); "
            "pass the arguments of one forward call"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    calls = list(recorder.calls.values())
    total = flow.flops // 2
    unseen = max(0, total - sum(call.macs for call in calls))
    return Trace(calls=calls, inside=recorder.inside, unseen_macs=unseen, batch=batch)
