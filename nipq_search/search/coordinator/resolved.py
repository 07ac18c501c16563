"""What follows from a configuration before anything is trained: graph, budgets, axes."""

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
from nipq_search.cost.projection import largest_terms
from nipq_search.errors import UserError
from nipq_search.quant import QuantConfig, prepare
from nipq_search.quant.graph import Graph
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.search.config.budgets import REFERENCE_BITS, ResolvedBudget, label_of, resolve
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.tasks import Task
from nipq_search.tasks.base import example_inputs, input_bits, unreadable
from nipq_search.train.models import load_float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a sweep before it starts.

    Attributes:
        graph: the model's layers and tensors.
        budgets: absolute budgets, in the ledger's order.
        front_cost: name of the cost of the front.
        metric: the task's metric.
        mode: `max` or `min`.
        axis: least reachable and uniform 8-bit front cost: the ends of the hypervolume.
        costs: by cost name, its least, greatest and uniform 8-bit value.
    """

    graph: Graph
    budgets: tuple[ResolvedBudget, ...]
    front_cost: str
    metric: str
    mode: str
    axis: tuple[float, float]
    costs: Mapping[str, Mapping[str, float]]

    def as_json(self) -> dict[str, Any]:
        """What reading commands need, as plain types."""
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
    """The task's model, with the weights in `float.checkpoint` where the sweep has one.

    Raises:
        UserError: it cannot be built, or the file is no checkpoint of it.
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
    """The graph of the task's model under the sweep's quantization.

    Raises:
        UserError: the model cannot be prepared, or `float.checkpoint` is none of it.
    """
    quant: QuantConfig = dataclasses.replace(
        config.quant, input_bits=config.quant.input_bits or input_bits(task)
    )
    prepared = prepare(float_model(config, task), example_inputs(task), quant)
    return quant_state(prepared).graph


def float_cost(graph: Graph, name: str) -> float:
    """A cost of the model in floating point: 32 bits everywhere."""
    return exact_cost(
        name, graph, {tensor: 32 for tensor, t in graph.tensors.items() if t.allowed}
    )


def gather(config: SweepConfig, task: Task, order: list[Mapping[str, Any]] | None = None) -> Facts:
    """Everything that can be said, and checked, before a sweep starts.

    Args:
        config: the sweep.
        task: its task.
        order: budgets in the order of an earlier run; new ones come behind them.

    Raises:
        UserError: a budget cannot be reached, or the model cannot be prepared.
    """
    graph = model_graph(config, task)
    entries: list[Mapping[str, Any]] = list(order or [])
    entries += [entry for entry in config.budgets if entry not in entries]
    budgets = tuple(resolve(entry, graph) for entry in entries)
    resolved: dict[tuple[tuple[str, float], ...], str] = {}
    for budget in budgets:
        key = tuple(sorted(budget.targets.items()))
        if key in resolved:
            raise UserError(
                f"budgets: {resolved[key]} and {budget.label} are the same; remove one"
            )
        resolved[key] = label_of(budget.entry)
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
    return Facts(
        graph=graph,
        budgets=budgets,
        front_cost=config.front_cost,
        metric=task.metric[0],
        mode=task.metric[1],
        axis=(front["least"], front["uniform8"]),
        costs=costs,
    )
