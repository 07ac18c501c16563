"""Test that models can be prepared, trained for one step, frozen and profiled.

    python benchmarks/zoo.py                    all timm families and transformers architectures
    python benchmarks/zoo.py --only vit swin    families whose names contain one of the words
    python benchmarks/zoo.py --json FILE        write the results after every model; also resumes
    python benchmarks/zoo.py --table docs/models.md    update the table of that page

A model passes if all of the following hold: with its quantizers disabled, it computes the same
outputs as the float model; one training step produces a gradient for every parameter that has one
in the float model, and for every quantizer parameter; its multiply-accumulates in `profile` equal
half of torch's FLOP count before and after freezing; the frozen model runs and satisfies its
budget. Weights are random, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nipq_search as ns
from nipq_search.cost.base import exact_cost, hard_bits, uniform_bits
from nipq_search.quant import quantizers
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.quant.tracing.trace import as_arguments, plain_kernels

sys.path.insert(0, str(Path(__file__).parent))
from pages import write_table
from zoo_models import timm_models, transformers_models


def tensors_with_gradient(value: Any) -> Iterator[Tensor]:
    """Yield every differentiable tensor of an output."""
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_with_gradient(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_with_gradient(item)


def any_loss(output: Any) -> Tensor:
    """Return a loss that depends on every differentiable tensor of an output."""
    return sum((x.float().square().mean() for x in tensors_with_gradient(output)), torch.zeros(()))


def twice(inputs: Any) -> Any:
    """Return a batch of two samples, made from inputs with one sample."""
    if isinstance(inputs, Tensor):
        return torch.cat([inputs, inputs + 0.1 if inputs.is_floating_point() else inputs])
    return {key: twice(value) for key, value in inputs.items()}


def count_macs(model: nn.Module, inputs: Any) -> int:
    """Return the multiply-accumulates of a forward pass, half of torch's FLOP count."""
    args, kwargs = as_arguments(inputs)
    counter = FlopCounterMode(display=False)
    with plain_kernels(), counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


def scale(output: Tensor) -> Tensor:
    """Return the standard deviation of an output, or the magnitude of a single value."""
    return output.std(correction=0) if output.numel() > 1 else output.abs().max()


def distance(model: nn.Module, prepared: nn.Module, inputs: Any) -> float:
    """Return how far a prepared model with disabled quantizers is from the float model.

    Args:
        model: the float model.
        prepared: the prepared model.
        inputs: arguments of a forward pass.

    Returns:
        The largest deviation of an element, relative to the `scale` of its output.
    """
    args, kwargs = as_arguments(inputs)
    found = quantizers(prepared).values()
    for quantizer in found:
        quantizer.observer = lambda x: None
    outputs = []
    for candidate in (model.eval(), prepared.eval()):
        torch.manual_seed(0)  # some models draw masks even in evaluation mode
        outputs.append(list(tensors_with_gradient(candidate(*args, **kwargs))))
    for quantizer in found:
        quantizer.observer = None
    scales = [max(float(scale(a.detach())), 1e-3) for a in outputs[0]]
    pairs = zip(*outputs, scales, strict=True)
    return max(float((a - b).detach().abs().max()) / scale for a, b, scale in pairs)


def try_model(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Test one model and return its statistics and failures; exceptions propagate."""
    args, kwargs = as_arguments(inputs)
    macs = count_macs(model.eval(), inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = ns.prepare(model, inputs)
    table = ns.profile(prepared)
    difference = distance(model, prepared, inputs)
    graph = quant_state(prepared).graph
    budget = ns.Budget(bops=exact_cost("bops", graph, uniform_bits(graph, 4)))
    optimizer = torch.optim.SGD(ns.param_groups(prepared, lr=1e-4), lr=1e-4)
    prepared.train()
    # In training, normalization needs more than one value per channel.
    args, kwargs = as_arguments(twice(inputs))
    loss = any_loss(prepared(*args, **kwargs)) + ns.cost_penalty(prepared, budget)
    loss.backward()
    any_loss(model.train()(*args, **kwargs)).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    lost = [
        name
        for name, p in prepared.named_parameters()
        if p.grad is None
        and p.requires_grad
        and (name in trained or name not in dict(model.named_parameters()))
    ]
    optimizer.step()
    ns.freeze(prepared, budget)
    prepared.eval()
    counted = (int(table["macs"].sum()), count_macs(prepared, inputs))
    failures = []
    if not difference < 1e-3:
        failures.append(f"outputs differ with quantizers disabled ({difference:.1g})")
    if not torch.isfinite(loss):
        failures.append("the loss is not finite")
    if lost:
        failures.append(f"no gradient: {', '.join(lost[:3])} ({len(lost)})")
    if counted != (macs, macs):
        failures.append(f"MACs {counted} instead of {macs}")
    if exact_cost("bops", graph, hard_bits(prepared)) > budget.targets["bops"]:
        failures.append("above the budget")
    left = table[table["why"] != ""]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": macs,
        "layers": len(table),
        "float_share": float(left["macs"].sum() / max(1, macs)),
        "float_work": sorted({f"{row.kind}: {row.why}" for row in left.itertuples()}),
        "failures": failures,
    }


def run(name: str, make: Any) -> dict[str, Any]:
    """Build and test a model, and return its result; an exception counts as a failure."""
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            architecture, model, inputs = make()
        result = {"model": architecture, **try_model(model, inputs)}
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        result = {"model": name, "failures": [f"{type(error).__name__}: {text}"]}
        result["traceback"] = traceback.format_exc()
    return {"name": name, **result, "seconds": round(time.perf_counter() - started, 1)}


def short(number: int) -> str:
    """Format a number in thousands or millions."""
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def markdown(results: list[dict[str, Any]]) -> str:
    """Format one table per source, with the share of the models that pass."""
    lines = []
    for source in dict.fromkeys(result["source"] for result in results):
        mine = [r for r in results if r["source"] == source]
        passed = sum(not r["failures"] for r in mine)
        lines += [
            f"### {source}: {passed} of {len(mine)} pass ({100 * passed / len(mine):.1f} %)",
            "",
            "| family | model | parameters | MACs | layers | in float | result |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in mine:
            text = "; ".join(r["failures"]).replace("|", "/") or "passes"
            if "macs" in r:
                share = f"{100 * r['float_share']:.2g} %" if r["float_share"] else ""
                lines.append(
                    f"| {r['name']} | {r['model']} | {short(r['parameters'])} "
                    f"| {short(r['macs'])} | {r['layers']} | {share} | {text} |"
                )
            else:
                lines.append(f"| {r['name']} | {r['model']} | | | | | {text} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Test all models without results; print the tables or write them to the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="substrings of family names")
    parser.add_argument("--source", choices=["timm", "transformers"], help="test only this source")
    parser.add_argument("--json", type=Path, help="file of results, which is extended")
    parser.add_argument("--table", type=Path, help="page whose table is updated")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())
    done = {(r["source"], r["name"]) for r in results}
    sources = {"timm": timm_models, "transformers": transformers_models}
    for source, models in sources.items():
        if options.source not in (None, source):
            continue
        for name, make in models():
            if (source, name) in done or (
                options.only and not any(word in name for word in options.only)
            ):
                continue
            result = {"source": source, **run(name, make)}
            results.append(result)
            state = "; ".join(result["failures"]) or "passes"
            print(
                f"{source} {name} ({result['model']}), {result['seconds']} s: {state}", flush=True
            )
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
            gc.collect()
    if options.table:
        write_table(options.table, "zoo", markdown(results))
    else:
        print(markdown(results))


if __name__ == "__main__":
    main()
