"""Agreement of the Triton kernels with those in C, on a GPU or in Triton's interpreter.

Compilation for a GPU and the resulting instructions are tested even without a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CHECK = """
import itertools, torch
from nipq_search.quant import kernels as K
from nipq_search.quant.numerics.functional import Grid
from nipq_search.quant.kernels import cpu, cuda
from nipq_search.quant.kernels.function import quantize
from nipq_search.quant.numerics.noise import with_origin
from test_quant_kernels import LAYOUTS, ONE, results

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    there = {name: getattr(ONE, name).to(device) for name in ("alpha", "bits", "minimum")}
    assert K.backend_for(torch.ones(4, device=device), ONE._replace(**there)) is cuda
small = [layout for layout in LAYOUTS if torch.Size(layout[0]).numel() < 6000]
kinds = list(itertools.product(Grid, ("uniform", "empirical", "rounding")))
places = list(itertools.product((True, False), (0, 70_003, 3 << 30)))
compared = 0
for (row, layout), (column, (grid, law)) in itertools.product(enumerate(small), enumerate(kinds)):
    # Triton's interpreter is slow, so it only covers every pair of values, not every triple.
    chosen = places if device == "cuda" else [places[(row + column) % len(places)]]
    for leaf, origin in chosen:
        key = None if law == "rounding" else with_origin(0xDEADBEEFCAFE1234, origin)
        fast, slow = (
            results(
                lambda x, b, backend=backend: quantize(backend, x, b, key, law == "empirical"),
                *layout, grid, 3, leaf=leaf, device=where,
            )
            for backend, where in ((cuda, device), (cpu, "cpu"))
        )
        if law == "rounding":
            assert torch.equal(fast[0], slow[0])
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        compared += 1
print(compared)
"""

NOISE = """
import torch
from nipq_search.quant.kernels import cuda
from nipq_search.quant.kernels.function import quantize
from quant_models import distance, residual_cdf
from test_quant_kernels import ONE, normal

device = "cuda" if torch.cuda.is_available() else "cpu"
there = ONE._replace(**{k: getattr(ONE, k).to(device) for k in ("alpha", "bits", "minimum")})
x = normal(120_000)
range_ = ONE.range(1)
inside = (x > range_.low) & (x < range_.high)
for empirical, cdf in ((False, lambda t: t + 0.5), (True, residual_cdf(range_))):
    y = quantize(cuda, x.to(device), there, 77 << 33 | 5, empirical).cpu()
    print(distance(((y - x) / range_.step)[inside][:100_000], cdf))
"""

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from nipq_search.quant.kernels import cuda

kinds = {"used_ptr": "*i64"}


def kind(name):
    if name.isupper():
        return "constexpr"
    return kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32")


for kernel in (cuda._forward_kernel, cuda._tensor_backward_kernel, cuda._channel_backward_kernel):
    for law, kept in ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1)):
        names = kernel.arg_names
        constants = {"LAW": law, "KEPT": kept, "BLOCK": 1024}
        source = ASTSource(
            kernel,
            {name: kind(name) for name in names},
            constexprs={k: v for k, v in constants.items() if k in names},
        )
        options = {"enable_fp_fusion": False}
        text = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        print("div.full" in text or "fma" in text)
"""


def run_apart(code, **environment):
    """Run in a separate process, because Triton selects the interpreter at import time."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "PYTHONPATH": f"{here}:{here.parent}:{here.parents[2]}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


HOW = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}


def test_triton_agrees_with_c():
    (compared,) = run_apart(CHECK, **HOW)
    assert int(compared) >= 60


def test_noise_of_triton_follows_its_law():
    distances = [float(line) for line in run_apart(NOISE, **HOW)]
    assert len(distances) == 2 and max(distances) < 0.01


def test_kernels_compile_for_a_gpu_and_round_as_a_cpu_does(tmp_path):
    """The compiled code contains neither approximate division nor fused multiply-add."""
    found = run_apart(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert found == ["False"] * 15


def test_triton_is_not_loaded_without_a_gpu():
    code = (
        "import sys, torch; from nipq_search.quant import prepare; "
        "prepare(torch.nn.Linear(4, 4), torch.ones(2, 4))(torch.ones(2, 4)); "
        "print('nipq_search.quant.kernels.cuda' in sys.modules)"
    )
    assert run_apart(code) == ["False"]
