"""The optimizer of a training run: SGD or AdamW, with a learning rate per parameter group."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nipq_search.quant import param_groups
from nipq_search.train.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig, quantized: bool) -> Optimizer:
    """Create an optimizer for the parameters of `model`; frozen bit-widths are not parameters.

    Each parameter group has a `name` and a `base_lr`, which the schedule scales.

    Args:
        model: a float or prepared model.
        config: optimizer, learning rates, momentum and weight decay.
        quantized: whether the model is prepared.

    Returns:
        A new optimizer, whose state is empty.
    """
    groups = _groups(model, config, quantized)
    for group in groups:
        group["base_lr"] = group["lr"]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0
    )


def _groups(model: nn.Module, config: TrainConfig, quantized: bool) -> list[dict[str, Any]]:
    """Return the non-empty parameter groups."""
    if quantized:
        return param_groups(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            lr_bits=config.lr * config.lr_bits,
            lr_boundaries=config.lr * config.lr_boundaries,
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "name": name,
            "params": [p for p in parameters if (p.dim() > 1) == decayed],
            "lr": config.lr,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for name, decayed in (("decayed", True), ("plain", False))
    ]
    return [group for group in groups if group["params"]]


def drop_group(optimizer: Optimizer, name: str) -> None:
    """Remove a parameter group and its state from the optimizer, if the group exists."""
    for group in [group for group in optimizer.param_groups if group["name"] == name]:
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
        optimizer.param_groups.remove(group)
