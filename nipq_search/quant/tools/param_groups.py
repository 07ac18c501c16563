"""Optimizer parameter groups of a prepared model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nipq_search.quant.insertion.prepare import unwrap
from nipq_search.quant.quantizers.base import FakeQuantizer
from nipq_search.quant.quantizers.bit_width import BitWidth


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    lr_boundaries: float | None = None,
    lr_bits: float | None = None,
) -> list[dict[str, Any]]:
    """Return optimizer parameter groups: parameters with and without decay, boundaries and bits.

    Weight decay applies neither to scalar and 1-D parameters (biases, normalization) nor to
    quantizer parameters. Parameters that require no gradient are omitted.

    Args:
        model: a prepared model, possibly wrapped.
        lr: learning rate of the model's own parameters.
        weight_decay: decay of parameters with two or more dimensions.
        lr_boundaries: learning rate of the truncation boundaries. Default: `lr`.
        lr_bits: learning rate of the bit-widths. Default: `lr`.

    Returns:
        The non-empty ones of the groups `decayed`, `plain`, `boundaries` and `bits`, each with its
        `name`. The `bits` group is absent once the bit-widths are frozen.

    Raises:
        UserError: the model is not prepared.

    Example:
        >>> import torch
        >>> from nipq_search import param_groups, prepare
        >>> model = prepare(torch.nn.Linear(8, 4), torch.rand(16, 8))
        >>> groups = param_groups(model, lr=0.01, weight_decay=1e-4, lr_bits=0.1)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('decayed', 0.01), ('plain', 0.01), ('boundaries', 0.01), ('bits', 0.1)]
        >>> optimizer = torch.optim.SGD(groups)
    """
    own: dict[int, str] = {}
    for module in unwrap(model).modules():
        if isinstance(module, FakeQuantizer):
            own.update((id(p), "boundaries") for p in module.parameters(recurse=False))
        elif isinstance(module, BitWidth):
            own.update((id(p), "bits") for p in module.parameters(recurse=False))
    groups: dict[str, list[Tensor]] = {"decayed": [], "plain": [], "boundaries": [], "bits": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            default = "decayed" if parameter.dim() > 1 else "plain"
            groups[own.get(id(parameter), default)].append(parameter)
    rates = {"boundaries": lr_boundaries, "bits": lr_bits}
    return [
        {
            "name": name,
            "params": parameters,
            "lr": lr if rates.get(name) is None else rates[name],
            "weight_decay": weight_decay if name == "decayed" else 0.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]
