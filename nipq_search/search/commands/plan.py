"""`plan`: the layers, budgets and expected effort of a sweep, computed without training."""

from __future__ import annotations

import math
from typing import Any

from nipq_search.cost import CONVENTION, COSTS, Budget, exact_cost, layer_rows, project
from nipq_search.cost.base import uniform_bits
from nipq_search.cost.projection import max_usage_bits, units_of
from nipq_search.quant import QUANTIZERS
from nipq_search.quant.graph import Graph
from nipq_search.quant.tools.norm import norm_layers
from nipq_search.records import SCHEMA
from nipq_search.search.checks.preflight import load_task
from nipq_search.search.config.budgets import REFERENCE_BITS, ResolvedBudget
from nipq_search.search.config.space import distribution, ends
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.search.coordinator.resolved import resolve_sweep
from nipq_search.search.strategies.strategies import STRATEGIES
from nipq_search.tasks.base import dataset
from nipq_search.train.loop import steps_in
from nipq_search.train.schedule import make_schedule
from nipq_search.train.starts.start import bits_at_budget


def plan(config: SweepConfig) -> dict[str, Any]:
    """Return the document that `plan --json` prints.

    Raises:
        UserError: the configuration would prevent a run from starting.
    """
    task = load_task(config)
    resolved = resolve_sweep(config, task)
    graph = resolved.graph
    layers = _layers(graph)
    budgets = [_budget_row(graph, budget) for budget in resolved.budgets]
    return {
        "schema": SCHEMA,
        "sweep": config.name,
        "bops_convention": CONVENTION,
        "data": _data(task),
        "layers": layers,
        "reachable": {
            name: {
                "least": resolved.costs[name]["least"],
                "greatest": resolved.costs[name]["greatest"],
            }
            for name in COSTS
        },
        "budgets": budgets,
        "trials": config.search.trials,
        "samples": _samples(config, task, graph),
        "noise_steps": _noise_steps(config, task),
        "disk_bytes": _disk(config, resolved.costs["weight_bytes"]["float"]),
    }


def _layers(graph: Graph) -> list[dict[str, Any]]:
    """Return a row per layer, with costs at `REFERENCE_BITS` and whether its bits are searched."""
    uniform = {n: int(b) for n, b in uniform_bits(graph, REFERENCE_BITS).items()}
    rows = layer_rows(graph, uniform)
    searched = {name for name, tensor in graph.tensors.items() if len(tensor.allowed) > 1}
    for row, layer in zip(rows, graph.layers, strict=True):
        row["searched"] = bool(searched & {layer.weight, layer.input, layer.second})
    return rows


def _budget_row(graph: Graph, budget: ResolvedBudget) -> dict[str, Any]:
    """Return a budget's targets, with the costs of the bit-widths that use the most of it."""
    targets = Budget(**budget.targets)
    bits = max_usage_bits(graph, targets)
    if not bits:  # the solver could not prove optimality, so fall back to a projection
        soft = bits_at_budget(graph, targets)
        zero_marginal = dict.fromkeys(soft, 0.0)
        bits = project(graph, targets, soft, zero_marginal)
    reachable = {name: exact_cost(name, graph, bits) for name in budget.targets}
    return {
        "label": budget.label,
        "targets": dict(budget.targets),
        "reachable": reachable,
        "reachable_share": max(reachable[n] / t for n, t in budget.targets.items()),
    }


def _data(task: Any) -> dict[str, Any]:
    """Return the data set's name, number of classes (None if it has none) and split sizes."""
    known = dataset(task)
    classes = known.get("classes")
    count = classes if classes is None or isinstance(classes, int) else len(classes)
    return {"name": known["name"], "classes": count, "splits": dict(known["splits"])}


def _samples(config: SweepConfig, task: Any, graph: Graph) -> int:
    """Return the number of training samples that a sweep without failures would process."""
    size: int | None = dataset(task)["splits"].get("train")
    if size is None:
        size = steps_in(task.loader("train", config.train.batch_size, 0)) * config.train.batch_size
    train = config.train
    batches = math.ceil(size / train.batch_size)
    trained = train.epochs * size
    norm_batches = train.norm_batches if norm_layers(task.build_model()) else 0
    calibration = min(train.calibration_batches, batches)
    extra = train.batch_size * (calibration + min(norm_batches, batches))
    runs = config.search.trials + len(config.search.baselines)
    floats: float = 0 if config.float_model.checkpoint else config.float_model.epochs * size
    fitted = train.batch_size * config.search.trials if train.fit_ranges else 0
    scores = 0
    if config.needs_scores:  # one pass for the float model, and one per width of each unit
        passes = 1 + sum(len(graph.tensors[unit].allowed) for unit in units_of(graph))
        scores = train.batch_size * (calibration + passes * min(train.score_batches, batches))
    return round(floats + runs * (trained + extra) + fitted + scores)


def _noise_steps(config: SweepConfig, task: Any) -> int:
    """Return the largest number of steps of a trial's noise phase; 0 if the strategy skips it.

    The trial is assumed to start from the float model.
    """
    train, strategy = config.train, STRATEGIES[config.search.strategy]()
    form = config.search.space.get("noise_share")
    shares = [train.noise_share] if form is None else ends(distribution("noise_share", form))
    schedule = make_schedule(
        epochs=train.epochs * strategy.epochs_share({}, None),
        batches_per_epoch=steps_in(task.loader("train", train.batch_size, 0)),
        accumulate=train.accumulate,
        noise_share=max(shares),
        warmup=0.0,
        quantized=True,
        learns_bits=QUANTIZERS[config.quant.quantizer].learns_bits,
    )
    return 0 if schedule.noise < strategy.least_noise_steps else schedule.noise


def _disk(config: SweepConfig, float_bytes: float) -> int:
    """Estimate the final disk usage in bytes, assuming models as large as the float model."""
    runs = 1 + config.search.trials + len(config.search.baselines)
    return round(runs * (1.1 * float_bytes + 50_000) + 10_000_000)
