"""Re-estimation of the normalization statistics of a quantized model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from nipq_search.errors import UserError
from nipq_search.quant.insertion.prepare import M, quant_state
from nipq_search.quant.tracing.trace import as_arguments, eval_without_grad


def norm_layers(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch-normalization layers that track running statistics."""
    kind = nn.modules.batchnorm._BatchNorm  # base class of all batch-normalization layers
    found = (module for module in model.modules() if isinstance(module, kind))
    return [module for module in found if module.track_running_stats]


def reestimate_norm_stats(model: M, batches: Iterable[Any] | Callable[[nn.Module], None]) -> M:
    """Replace batch normalization's running statistics with averages over `batches`, in place.

    All other layers run in eval mode with hard quantization. Training modes and RNG states are
    restored afterwards. A normalization layer that no batch reaches keeps its statistics.

    Args:
        model: any model; returned unchanged if it has no batch normalization.
        batches: inputs in the format of the `calibration` argument of `prepare`, with one forward
            pass per batch (for an unprepared model, only the first entry of a tuple is passed), or
            a function that runs the model on data.

    Returns:
        The same model.

    Raises:
        UserError: no batch reached a normalization layer; the previous statistics are restored.

    Example:
        >>> import torch
        >>> from nipq_search import prepare, reestimate_norm_stats
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        >>> model = prepare(net, torch.rand(16, 8))
        >>> model = reestimate_norm_stats(model, [torch.rand(16, 8) for _ in range(3)])
        >>> int(model[1].num_batches_tracked)
        3
    """
    norms = norm_layers(model)
    if not norms:
        return model
    momenta = [module.momentum for module in norms]
    with eval_without_grad(model):
        before = [{n: b.clone() for n, b in module.named_buffers()} for module in norms]
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # selects a cumulative average
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
    runs = [int(m.num_batches_tracked) if m.num_batches_tracked is not None else 0 for m in norms]
    for module, count, buffers in zip(norms, runs, before, strict=True):
        if count == 0:  # the layer did not run, as in an auxiliary head that eval mode skips
            for name, buffer in buffers.items():
                module.get_buffer(name).copy_(buffer)
    if max(runs) == 0:
        raise UserError(
            "reestimate_norm_stats: no batch reached a normalization layer; pass one that does"
        )
    return model


def _arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the forward arguments contained in a batch, also for an unprepared model."""
    try:
        return quant_state(model).arguments(batch)
    except UserError:
        args, kwargs = as_arguments(batch)
        return args[:1], kwargs
