"""Normalization statistics of a quantized model, estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from nipq_search.errors import UserError
from nipq_search.quant.insertion.prepare import M, quant_state
from nipq_search.quant.tracing.trace import as_arguments, unchanged_mode


def norm_layers(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers of a model that keep running statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    found = (module for module in model.modules() if isinstance(module, kind))
    return [module for module in found if module.track_running_stats]


def reestimate_norm_stats(model: M, batches: Iterable[Any] | Callable[[nn.Module], None]) -> M:
    """Replace running statistics by the averages over `batches`, in place.

    Everything but the normalization layers runs as in evaluation, hard-quantized; random
    generators and modes are left as they were.

    Args:
        model: any model with batch normalization; others are returned as they are.
        batches: inputs, one forward each, as `prepare` takes them for calibration (for a model
            that is not prepared the first entry of a tuple), or a function that runs the model
            on data itself.

    Raises:
        UserError: there was no batch; the old statistics are back.
    """
    norms = norm_layers(model)
    if not norms:
        return model
    momenta = [module.momentum for module in norms]
    with unchanged_mode(model):
        before = [{n: b.clone() for n, b in module.named_buffers()} for module in norms]
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # a cumulative average
            module.train()
        try:
            if callable(batches):
                batches(model)
            else:
                for batch in batches:
                    args, kwargs = _arguments(model, batch)
                    model(*args, **kwargs)
        finally:
            for module, momentum in zip(norms, momenta, strict=True):
                module.momentum = momentum
    seen = [int(m.num_batches_tracked) if m.num_batches_tracked is not None else 0 for m in norms]
    for module, count, buffers in zip(norms, seen, before, strict=True):
        if count == 0:  # it did not run, as auxiliary heads do not in evaluation
            for name, buffer in buffers.items():
                module.get_buffer(name).copy_(buffer)
    if max(seen) == 0:
        raise UserError("reestimate_norm_stats: no batches; give at least one")
    return model


def _arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        return quant_state(model).arguments(batch)
    except UserError:
        args, kwargs = as_arguments(batch)
        return args[:1], kwargs
