"""Measure the time of a forward and backward pass of quantizers, relative to `clone`.

    python benchmarks/quantizer.py --json quantizer.json [--table docs/performance.md]

All quantizers run alternately, and the results are medians. The baseline, `clone`, reads and
writes a tensor in the forward pass and passes on the gradient in the backward pass. Memory is the
peak beyond the input, the output and their gradients, until the end of the backward pass.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pages import write_table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from nipq_search.quant import kernels
from nipq_search.quant.numerics import functional as F
from nipq_search.quant.numerics.functional import Boundary, Grid
from nipq_search.quant.numerics.noise import drawn_from, mix, residuals_of, uniform_noise

WEIGHTS = ((64, 64, 3, 3), (512, 512, 3, 3))
"""Shapes that are measured as weights."""

SHAPES = (*WEIGHTS, (32, 64, 56, 56), (8192, 384))
"""All shapes; those not in `WEIGHTS` are measured as activations."""

BITS = 4.0
"""Bit-width of every quantizer."""

_HISTOGRAM_BINS = 256


def grid_of(alpha: Tensor) -> Boundary:
    """Return a truncation boundary at `alpha`, with a signed grid of `BITS` bits."""
    bits = torch.full((1,), BITS, device=alpha.device)
    return Boundary(alpha, bits, Grid.SIGNED, torch.zeros(1, device=alpha.device))


def reference(x: Tensor, boundary: Boundary, step: int) -> Tensor:
    """Add noise that `multinomial` draws from a histogram of the rounding residuals.

    Args:
        x: the tensor.
        boundary: its truncation boundary.
        step: ignored.

    Returns:
        The tensor with noise, truncated at the boundary; same shape as `x`.
    """
    range_ = boundary.range(x.dim())
    with torch.no_grad():
        inside = (x > range_.low) & (x < range_.high)
        scaled = (x / range_.step)[inside]
        residual = scaled.round() - scaled
        counts = torch.histc(residual, _HISTOGRAM_BINS, -0.5, 0.5)
        bins = torch.multinomial(counts, x.numel(), replacement=True).view(x.shape)
        noise = (bins + torch.rand_like(x)) / _HISTOGRAM_BINS - 0.5
    return F.pseudo_quantize(x, range_, noise)


def diffq(x: Tensor, boundary: Boundary, step: int) -> Tensor:
    """Add uniform noise scaled to the tensor's range, without truncation (Defossez et al., 2021).

    Args:
        x: the tensor.
        boundary: ignored.
        step: ignored.

    Returns:
        The tensor with noise; same shape as `x`.
    """
    span = x.max() - x.min()
    return x + span / (2**BITS - 1) * (torch.rand_like(x) - 0.5)


def eager(empirical: bool) -> Callable[[Tensor, Boundary, int], Tensor]:
    """Return NIPQ's quantizer in torch operations, with empirical or uniform noise."""

    def quantize(x: Tensor, boundary: Boundary, step: int) -> Tensor:
        range_ = boundary.range(x.dim())
        if empirical:
            noise = drawn_from(residuals_of(x, *range_[:3]), x.shape, mix(step))
        else:
            noise = uniform_noise(x.shape, mix(step), x.device, x.dtype)
        return F.pseudo_quantize(x, range_, noise)

    return quantize


def fused_fake_quantize(device: str) -> Callable[[Tensor, Boundary, int], Tensor]:
    """Return torch.ao's fused module with a moving average, which has no learned parameters."""
    observer = torch.ao.quantization.MovingAverageMinMaxObserver
    module = torch.ao.quantization.FusedMovingAvgObsFakeQuantize(
        observer=observer, quant_min=0, quant_max=15
    ).to(device)
    return lambda x, boundary, step: module(x)


def kinds(device: str) -> dict[str, Callable[[Tensor, Boundary, int], Tensor]]:
    """Return the quantizers by name; the first one is the baseline."""
    return {
        "clone": lambda x, boundary, step: x.clone(),
        "NIPQ, uniform": lambda x, b, step: kernels.pseudo_quantize(x, b, mix(step)),
        "NIPQ, empirical": lambda x, b, step: kernels.pseudo_quantize(x, b, mix(step), True),
        "LSQ": lambda x, b, step: kernels.hard_quantize(x, b),
        "NIPQ, uniform, torch operations": eager(False),
        "NIPQ, empirical, torch operations": eager(True),
        "LSQ, torch operations": lambda x, b, step: F.hard_quantize(x, b.range(x.dim())),
        "NIPQ, histogram and multinomial": reference,
        "DiffQ-like": diffq,
        "torch FakeQuantize, fused": fused_fake_quantize(device),
    }


class Case:
    """An input of one shape, its boundary, and the gradient of its output."""

    def __init__(self, shape: tuple[int, ...], device: str) -> None:
        """Draw the input and the gradient from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        self.device, self.is_weight = device, shape in WEIGHTS
        self.x = torch.randn(*shape, generator=generator).to(device).requires_grad_()
        self.grad = torch.randn(*shape, generator=generator).to(device)
        self.alpha = nn.Parameter(torch.full((1,), 1.7, device=device))

    def run(self, kind: Callable[[Tensor, Boundary, int], Tensor], step: int) -> None:
        """Run one forward and backward pass of a quantizer."""
        self.x.grad = self.alpha.grad = None
        # An activation is a non-leaf tensor, so saving it for the backward pass takes memory.
        x = self.x if self.is_weight else self.x.view_as(self.x)
        kind(x, grid_of(self.alpha), step).backward(self.grad)

    def seconds(self, kind: Callable[[Tensor, Boundary, int], Tensor], step: int) -> float:
        """Return the time of one forward and backward pass."""
        self._wait()
        started = time.perf_counter()
        self.run(kind, step)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        """Wait until the GPU has finished, if one is used."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def extra_memory(self, kind: Callable[[Tensor, Boundary, int], Tensor]) -> float:
        """Return the peak memory beyond input, output and gradients, in multiples of the input."""
        self.run(kind, 0)
        size = self.x.numel() * 4
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run(kind, 1)
            return (torch.cuda.max_memory_allocated() - before) / size - 1
        self.x.grad = self.alpha.grad = None
        peak = peak_bytes(lambda: self.run(kind, 1))
        return peak / size - 2  # excludes the output and the gradient of x


def peak_bytes(function: Callable[[], None]) -> int:
    """Return the peak memory of torch's CPU allocator during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    held = peak = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(shape: tuple[int, ...], device: str, repeats: int) -> list[dict[str, Any]]:
    """Measure all quantizers for one shape.

    Args:
        shape: shape of the tensor.
        device: `cpu` or `cuda`.
        repeats: number of timed runs.

    Returns:
        One row per quantizer: median time in milliseconds, its ratio to `clone`, and the extra
        memory in multiples of the input.
    """
    case, found = Case(shape, device), kinds(device)
    slow = {"NIPQ, histogram and multinomial"}
    times: dict[str, list[float]] = {name: [] for name in found}
    for repeat in range(repeats + 1):
        for name, kind in found.items():
            if name in slow and repeat > max(3, repeats // 5):
                continue
            taken = case.seconds(kind, repeat)
            if repeat:  # the first run is a warmup
                times[name].append(taken)
    yardstick = statistics.median(times["clone"])
    return [
        {
            "shape": list(shape),
            "kind": name,
            "milliseconds": 1000 * statistics.median(times[name]),
            "over_clone": statistics.median(times[name]) / yardstick,
            "extra_memory": case.extra_memory(found[name]),
            "repeats": len(times[name]),
        }
        for name in found
    ]


def keep_memory() -> None:
    """Make glibc keep freed memory, as in the steady state of a training run.

    Otherwise, page faults, which take several milliseconds per tensor, dominate the measurement.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(trim_threshold, 1 << 30)
        library.mallopt(mmap_threshold, 32 << 20)


def machine(device: str) -> dict[str, Any]:
    """Describe the hardware and software on which the results depend."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].split(":")[1].strip() if names else model
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format a table of times with quantizers as rows and shapes as columns, and extra memory."""
    shapes = [tuple(shape) for shape in dict.fromkeys(tuple(row["shape"]) for row in rows)]
    by_place = {(row["kind"], tuple(row["shape"])): row for row in rows}
    head = "| | " + " | ".join(str(shape) for shape in shapes) + " | extra memory |"
    lines = [head, "|---" * (len(shapes) + 2) + "|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = []
        for shape in shapes:
            row = by_place[kind, shape]
            cells.append(f"{row['milliseconds']:.2f} ms ({row['over_clone']:.1f})")
        largest = max(shapes, key=math.prod)
        cells.append(f"{by_place[kind, largest]['extra_memory']:.1f}")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all shapes; print the table or write it to the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for machine and results")
    parser.add_argument("--table", type=Path, help="page whose table is updated")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    keep_memory()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        rows += measure(shape, options.device, options.repeats)
        if options.json:
            result = {"machine": machine(options.device), "rows": rows}
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.table:
        write_table(options.table, "quantizer", markdown(rows))
    else:
        print(markdown(rows))


if __name__ == "__main__":
    main()
