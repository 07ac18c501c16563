"""Measure time and memory of a training step with NIPQ and LSQ, relative to the float model.

    python benchmarks/train_step.py --json train_step.json [--table docs/performance.md]

A step consists of the forward pass, cross-entropy, the backward pass and an SGD update. All
variants run alternately, and the results are medians. All variants of a model use the memory
format that the training loop would choose. `torch FakeQuantize` is torch.ao's fused module on
every weight and input, without learned parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from pages import write_table
from quantizer import machine, peak_bytes
from torch import Tensor, nn

from nipq_search.quant import QuantConfig, prepare, quantizers
from nipq_search.tasks.vision.resnet import ResNet
from nipq_search.train.memory_format import use_channels_last

CLASSES = 10
"""Number of outputs of every model."""


class Encoder(nn.Module):
    """A transformer encoder as in small language models: 6 layers, width 384, 12 heads."""

    def __init__(self) -> None:
        """Create the layers."""
        super().__init__()
        layer = nn.TransformerEncoderLayer(384, 12, 1536, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(384, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map embeddings (B, L, 384) to logits (B, classes)."""
        return self.head(self.layers(x).mean(1))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and the shape of its inputs."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def models(batch: int) -> dict[str, Model]:
    """Return the models of the table by name; the small ResNet uses 16 times the batch size."""
    return {
        "resnet18, 224 px": Model(
            lambda: timm.create_model("resnet18", num_classes=CLASSES), (batch, 3, 224, 224)
        ),
        "mobilenetv2_100, 224 px": Model(
            lambda: timm.create_model("mobilenetv2_100", num_classes=CLASSES),
            (batch, 3, 224, 224),
        ),
        "Fashion-MNIST ResNet, 28 px": Model(lambda: ResNet(width=16), (16 * batch, 1, 28, 28)),
        "encoder 6 x 384, 128 tokens": Model(Encoder, (batch, 128, 384)),
    }


class FakeQuantized(nn.Module):
    """A layer of torch with torch.ao's fused quantizers on its weight and its input."""

    def __init__(self, layer: nn.Module) -> None:
        """Wrap `layer`, whose weight is parametrized in place."""
        super().__init__()
        ao = torch.ao.quantization
        self.layer = layer
        self.activation = ao.FusedMovingAvgObsFakeQuantize(
            observer=ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=15
        )
        weight = ao.FusedMovingAvgObsFakeQuantize(
            observer=ao.MovingAveragePerChannelMinMaxObserver,
            quant_min=-7,
            quant_max=7,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        )
        nn.utils.parametrize.register_parametrization(layer, "weight", weight, unsafe=True)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input and the weight to 4 bits and apply the layer."""
        return self.layer(self.activation(x.float()))  # type: ignore[no-any-return]


def with_fake_quantize(model: nn.Module) -> nn.Module:
    """Wrap every convolution and linear layer in place, except the projections of attention."""
    for module in list(model.modules()):
        if isinstance(module, nn.MultiheadAttention | FakeQuantized):
            continue
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d | nn.Linear) and not isinstance(module, FakeQuantized):
                setattr(module, name, FakeQuantized(child))
    return model


def variants(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """Return the float model, under `float32`, and its quantized variants by name."""

    def prepared(quantizer: str, frozen: bool = False) -> nn.Module:
        config = QuantConfig(quantizer=quantizer)
        made = prepare(copy.deepcopy(model), (x[:2],), config, calibration=[(x,)])
        if frozen:
            for each in quantizers(made).values():
                each.freeze(4)
        return made

    return {
        "float32": model,
        "NIPQ, noise phase": prepared("nipq"),
        "NIPQ, tuning phase": prepared("nipq", frozen=True),
        "LSQ": prepared("lsq"),
        "torch FakeQuantize": with_fake_quantize(copy.deepcopy(model)),
    }


class Training:
    """One variant with its optimizer.

    Args:
        model: the model.
        x: the inputs of every step, with the batch as the first dimension.
        precision: `float32` or `bfloat16`.
    """

    def __init__(self, model: nn.Module, x: Tensor, precision: str) -> None:
        """Create labels and an optimizer for the model."""
        self.model, self.x, self.precision = model.train(), x, precision
        self.y = torch.arange(len(x), device=x.device) % CLASSES
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(self) -> None:
        """Take one optimizer step."""
        context: Any = contextlib.nullcontext()
        if self.precision == "bfloat16":
            context = torch.autocast(self.x.device.type, dtype=torch.bfloat16)
        self.optimizer.zero_grad()
        with context:
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()

    def seconds(self) -> float:
        """Return the time of one step."""
        wait = torch.cuda.synchronize if self.x.is_cuda else lambda: None
        wait()
        started = time.perf_counter()
        self.step()
        wait()
        return time.perf_counter() - started

    def memory(self) -> int:
        """Return the peak memory of a step beyond the parameters, in bytes."""
        if self.x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        return peak_bytes(self.step)


def measure(
    name: str, model: Model, device: str, precision: str, repeats: int
) -> list[dict[str, Any]]:
    """Measure all variants of one model.

    Args:
        name: name of the model.
        model: the model and its input shape.
        device: `cpu` or `cuda`.
        precision: `float32` or `bfloat16`.
        repeats: number of timed steps.

    Returns:
        One row per variant: median time of a step in milliseconds, and its time and peak memory
        relative to the float model.
    """
    torch.manual_seed(0)
    x = torch.rand(*model.shape, device=device)
    layout = use_channels_last(model.build().to(device), (x[:2],))
    trainings = {key: Training(v, x, precision) for key, v in variants(layout, x).items()}
    times: dict[str, list[float]] = {key: [] for key in trainings}
    for repeat in range(repeats + 1):
        for key, training in trainings.items():
            taken = training.seconds()
            if repeat:
                times[key].append(taken)
    memory = {key: training.memory() for key, training in trainings.items()}
    base = next(iter(trainings))
    return [
        {
            "model": name,
            "shape": list(model.shape),
            "precision": precision,
            "kind": key,
            "milliseconds": 1000 * statistics.median(times[key]),
            "over_float": statistics.median(times[key]) / statistics.median(times[base]),
            "memory_over_float": memory[key] / memory[base],
            "repeats": repeats,
        }
        for key in trainings
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format models as rows and variants as columns: time and memory relative to float."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))[1:]
    lines = [
        "| model | precision | float step | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 3) + "|",
    ]
    for key in dict.fromkeys((row["model"], row["precision"]) for row in rows):
        own = {r["kind"]: r for r in rows if (r["model"], r["precision"]) == key}
        cells = [
            f"{own[kind]['over_float']:.2f} ({own[kind]['memory_over_float']:.2f})"
            for kind in kinds
        ]
        step = own["float32"]["milliseconds"]
        lines.append(f"| {key[0]} | {key[1]} | {step:.0f} ms | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all models and precisions; print the table or write it to the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for machine and results")
    parser.add_argument("--table", type=Path, help="page whose table is updated")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", nargs="*", help="prefixes of model names")
    parser.add_argument("--precisions", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, model in models(options.batch).items():
        if options.only and not name.startswith(tuple(options.only)):
            continue
        for precision in options.precisions:
            rows += measure(name, model, options.device, precision, options.repeats)
            if options.json:
                result = {"machine": machine(options.device), "rows": rows}
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.table:
        write_table(options.table, "train-step", markdown(rows))
    else:
        print(markdown(rows))


if __name__ == "__main__":
    main()
