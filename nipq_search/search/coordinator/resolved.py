"""The resolved sweep, computed before training: graph, absolute targets, ends of the cost axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nipq_search.cost import COSTS, exact_cost
from nipq_search.cost.base import extreme_bits, uniform_bits
from nipq_search.cost.reachable import largest_terms
from nipq_search.errors import UserError
from nipq_search.quant import QuantConfig, prepare
from nipq_search.quant.graph import Graph
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.search.config.budgets import (
    REFERENCE_BITS,
    ResolvedBudget,
    budget_label,
    resolve_budget,
)
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.tasks import Task
from nipq_search.tasks.base import example_inputs, input_bits, unreadable
from nipq_search.train.models import load_float


@dataclass(frozen=True, kw_only=True)
class ResolvedSweep:
    """A sweep's configuration resolved against its model.

    Attributes:
        graph: layers and tensors of the prepared model.
        budgets: the budgets with their absolute targets, in the ledger's order.
        front_cost: name of the front's cost.
        metric: name of the task's metric.
        mode: direction of the metric, `max` or `min`.
        axis: front costs of the cheapest reachable model and of the uniform 8-bit model, between
            which the hypervolume is measured.
        costs: by cost name, the costs of the cheapest (`least`), the most expensive (`greatest`),
            the uniform 8-bit (`uniform8`) and the float (`float`) model.
    """

    graph: Graph
    budgets: tuple[ResolvedBudget, ...]
    front_cost: str
    metric: str
    mode: str
    axis: tuple[float, float]
    costs: Mapping[str, Mapping[str, float]]

    def as_json(self) -> dict[str, Any]:
        """Return, as plain types, what `facts.json` stores about the resolved sweep."""
        return {
            "budgets": [
                {"label": b.label, "entry": dict(b.entry), "targets": dict(b.targets)}
                for b in self.budgets
            ],
            "front_cost": self.front_cost,
            "metric": self.metric,
            "mode": self.mode,
            "axis": list(self.axis),
            "costs": {name: dict(values) for name, values in self.costs.items()},
            "least_set_by": {name: largest_terms(name, self.graph) for name in self.costs},
        }


def float_model(config: SweepConfig, task: Task) -> nn.Module:
    """Return the task's model, with the weights of `float.checkpoint` if set, otherwise untrained.

    Raises:
        UserError: the model cannot be built, or the file cannot be read, is not a checkpoint of
            this model, or contains weights that are not finite.
    """
    device = torch.device("cpu")
    if (name := config.float_model.checkpoint) is None:
        return load_float(task, None, 0, device)
    file = Path(name).expanduser()
    try:
        if file.is_dir():
            raise UserError(f"float.checkpoint: {file} is a folder; name a file in it")
        if not file.is_file():
            raise UserError(f"float.checkpoint: {file}: no such file")
        model = load_float(task, file, 0, device)
    except PermissionError as error:
        raise UserError(f"float.checkpoint: {unreadable(error)}") from error
    except UserError as error:
        if isinstance(cause := error.__cause__, PermissionError):
            raise UserError(f"float.checkpoint: {unreadable(cause)}") from error
        raise UserError(str(error).replace("float model", "float.checkpoint:", 1)) from error
    for weight, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise UserError(f"float.checkpoint: {file}: weights are not finite: {weight}")
    return model


def model_graph(config: SweepConfig, task: Task) -> Graph:
    """Return the graph of the task's model under the sweep's quantization.

    Raises:
        UserError: the model cannot be prepared, or `float.checkpoint` does not fit it.
    """
    quant: QuantConfig = dataclasses.replace(
        config.quant, input_bits=config.quant.input_bits or input_bits(task)
    )
    prepared = prepare(float_model(config, task), example_inputs(task), quant)
    return quant_state(prepared).graph


def float_cost(graph: Graph, name: str) -> float:
    """Return a cost of the float model: 32 bits for every tensor that would be quantized."""
    return exact_cost(
        name, graph, {tensor: 32 for tensor, t in graph.tensors.items() if t.allowed}
    )


def resolve_sweep(
    config: SweepConfig, task: Task, order: list[Mapping[str, Any]] | None = None
) -> ResolvedSweep:
    """Resolve and check a configuration before the sweep starts.

    Args:
        config: the sweep configuration.
        task: the sweep's task.
        order: budgets of an earlier run, in the ledger's order; new ones are appended.

    Returns:
        The resolved sweep.

    Raises:
        UserError: a budget cannot be reached, two budgets are equal, the model cannot be prepared,
            or `float.checkpoint` does not fit it.
    """
    graph = model_graph(config, task)
    entries: list[Mapping[str, Any]] = list(order or [])
    entries += [entry for entry in config.budgets if entry not in entries]
    budgets = tuple(resolve_budget(entry, graph) for entry in entries)
    resolved: dict[tuple[tuple[str, float], ...], str] = {}
    for budget in budgets:
        key = tuple(sorted(budget.targets.items()))
        if key in resolved:
            raise UserError(f"budgets: {resolved[key]} and {budget.label} are equal; remove one")
        resolved[key] = budget_label(budget.entry)
    least, most = extreme_bits(graph, most=False), extreme_bits(graph, most=True)
    uniform = uniform_bits(graph, REFERENCE_BITS)
    costs = {
        name: {
            "least": exact_cost(name, graph, least),
            "greatest": exact_cost(name, graph, most),
            "uniform8": exact_cost(name, graph, uniform),
            "float": float_cost(graph, name),
        }
        for name in COSTS
    }
    front = costs[config.front_cost]
    return ResolvedSweep(
        graph=graph,
        budgets=budgets,
        front_cost=config.front_cost,
        metric=task.metric[0],
        mode=task.metric[1],
        axis=(front["least"], front["uniform8"]),
        costs=costs,
    )
