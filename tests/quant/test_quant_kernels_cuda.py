"""The Triton kernels, by Triton's interpreter on a CPU: they compute what those in C do."""

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
from nipq_search.quant.functional import Grid
from nipq_search.quant.kernels import cpu, cuda
from nipq_search.quant.kernels.function import quantize
from test_quant_kernels import LAYOUTS, results

small = [layout for layout in LAYOUTS if torch.Size(layout[0]).numel() < 6000]
compared = 0
for layout, grid, law in itertools.product(small, Grid, ("uniform", "empirical", "rounding")):
    for leaf in (True, False):
        fast, slow = (
            results(
                lambda x, b, backend=backend: quantize(
                    backend, x, b, None if law == "rounding" else 0xDEADBEEFCAFE1234,
                    law == "empirical",
                ),
                *layout, grid, 3, leaf=leaf,
            )
            for backend in (cuda, cpu)
        )
        if law == "rounding":
            assert torch.equal(fast[0], slow[0])
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        compared += 1
print(compared)
"""


def interpreted(code):
    """Run in a process whose Triton interprets kernels: it is decided when Triton is imported."""
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{here}:{here.parents[1]}"},
        check=False,
    )


def test_triton_agrees_with_c():
    done = interpreted(CHECK)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 120


NOISE = """
import torch
from nipq_search.quant.kernels import cuda
from nipq_search.quant.kernels.function import quantize
from test_quant_kernels import ONE, distance, normal, residual_cdf
x = normal(120_000)
range_ = ONE.range(1)
inside = (x > range_.low) & (x < range_.high)
for empirical, cdf in ((False, lambda t: t + 0.5), (True, residual_cdf(range_))):
    drawn = ((quantize(cuda, x, ONE, 77 << 33 | 5, empirical) - x) / range_.step)[inside]
    print(distance(drawn[:100_000], cdf))
"""


def test_noise_of_triton_follows_its_law():
    done = interpreted(NOISE)
    assert done.returncode == 0, done.stderr[-3000:]
    distances = [float(line) for line in done.stdout.split()]
    assert len(distances) == 2 and max(distances) < 0.01


def test_triton_is_not_loaded_without_a_gpu():
    code = (
        "import sys, torch; from nipq_search.quant import prepare; "
        "prepare(torch.nn.Linear(4, 4), torch.ones(2, 4))(torch.ones(2, 4)); "
        "sys.exit('nipq_search.quant.kernels.cuda' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_what_a_cpu_does():
    from test_quant_kernels import LAYOUTS, Boundary, Grid, case

    from nipq_search.quant import kernels as K

    for layout in LAYOUTS:
        for law in ("uniform", "empirical", "rounding"):
            found = []
            for device in ("cpu", "cuda"):
                (x, alpha, bits), b = case(*layout, Grid.SIGNED, 4)
                leaves = [t.detach().to(device).requires_grad_() for t in (x, alpha, bits)]
                boundary = Boundary(leaves[1], leaves[2], b.grid, b.minimum.to(device), b.axis)
                if law == "rounding":
                    y = K.hard_quantize(leaves[0], boundary)
                else:
                    y = K.pseudo_quantize(leaves[0], boundary, 99, law == "empirical")
                assert K.backend_for(leaves[0], boundary) is not None
                grads = torch.autograd.grad(y.square().sum(), leaves)
                found.append([t.detach().cpu() for t in (y, *grads)])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
