"""The C kernels compute what the torch operations compute, and are used where they should be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from quant_models import images, normal, residual_net
from torch import nn

from nipq_search.quant import QuantConfig, prepare
from nipq_search.quant import functional as F
from nipq_search.quant import kernels as K
from nipq_search.quant.functional import Grid
from nipq_search.quant.kernels import build, cpu
from nipq_search.quant.noise import (
    drawn_from,
    inner_size,
    mix,
    residuals_of,
    uniform_noise,
)
from test_quant_noise import distance, residual_cdf

CPU = torch.device("cpu")
CHANNELS_LAST = torch.channels_last

# Shape, axis of the boundaries (None: one), memory format. Sizes that are no multiple of a
# vector, runs shorter than one, channels side by side, more than a piece of a thread's work.
LAYOUTS = [
    ((7,), None, None),
    ((70_001,), None, None),
    ((3, 5, 9, 11), None, CHANNELS_LAST),
    ((4, 6, 20, 16), None, "heads"),
    ((20, 3, 3, 3), 0, None),
    ((20, 3, 3, 3), 0, CHANNELS_LAST),
    ((8, 20, 3, 3), 1, None),
    ((40, 33), 1, None),
    ((33, 3000), 0, None),
    ((1, 16), 1, None),
]


def case(shape, axis, memory, grid, bits, seed=0):
    """A tensor, its range, and the leaves that both hang on."""
    x = normal(*shape, seed=seed)
    if memory is CHANNELS_LAST:
        x = x.contiguous(memory_format=CHANNELS_LAST)
    elif memory == "heads":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if grid is Grid.UNSIGNED:
        x = x.abs()
    boundary = torch.ones(1) if axis is None else torch.linspace(0.7, 1.9, shape[axis])
    if axis is not None:
        boundary = boundary.view([-1 if d == axis else 1 for d in range(len(shape))])
    leaves = [t.requires_grad_() for t in (x, boundary * 1.3, torch.tensor([float(bits)]))]
    minimum = torch.tensor([-0.6])
    return leaves, F.quantization_range(leaves[1], leaves[2], grid, minimum)


def eager(x, range_, key, empirical):
    """The same without kernels."""
    if empirical:
        drawn = drawn_from(residuals_of(x, *range_[:3]), x.shape, key)
    else:
        drawn = uniform_noise(x.shape, key, CPU, x.dtype)
    return F.pseudo_quantize(x, range_, drawn.as_strided(x.shape, x.stride()))


def results(quantize, *arguments):
    """Output and gradients under a gradient that differs from element to element."""
    leaves, range_ = case(*arguments)
    y = quantize(leaves[0], range_)
    grads = torch.autograd.grad(y, leaves, normal(*y.shape, seed=9), allow_unused=True)
    return [y, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("grid", list(Grid))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("law", ["uniform", "empirical", "rounding"])
def test_kernels_agree_with_torch_operations(law, layout, grid):
    key, empirical = mix(7, 1), law == "empirical"
    for bits in (2, 4.6 if law != "rounding" else 5, 14):
        arguments = (*layout, grid, bits)
        if law == "rounding":
            fast, plain = (results(f, *arguments) for f in (K.hard_quantize, F.hard_quantize))
            assert torch.equal(fast[0], plain[0])
        else:
            fast = results(lambda x, r: K.pseudo_quantize(x, r, key, empirical), *arguments)
            plain = results(lambda x, r: eager(x, r, key, empirical), *arguments)
        assert type(fast[0].grad_fn).__name__ == "_QuantizeBackward"
        assert fast[0].stride() == plain[0].stride()
        for a, b in zip(fast, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_sums_do_not_hang_on_the_number_of_threads():
    def run():
        return [
            results(lambda x, r: K.pseudo_quantize(x, r, 5, False), *layout, Grid.SIGNED, 3)
            for layout in LAYOUTS
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(3)
        together = run()
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_noise_of_the_kernels_follows_its_law():
    x = normal(200_000)
    range_ = F.quantization_range(
        torch.tensor([1.7]), torch.tensor([3.0]), Grid.SIGNED, torch.zeros(1)
    )
    inside = (x > range_.low) & (x < range_.high)
    for empirical, cdf in ((False, lambda t: t + 0.5), (True, residual_cdf(range_))):
        y = K.pseudo_quantize(x, range_, mix(3), empirical)
        drawn = ((y - x) / range_.step)[inside][:100_000]
        assert distance(drawn, cdf) < 0.01


def test_values_that_are_no_numbers_stay_visible():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.3])
    range_ = F.quantization_range(
        torch.tensor([1.0]), torch.tensor([4.0]), Grid.SIGNED, torch.zeros(1)
    )
    for quantize in (K.hard_quantize, lambda x, r: K.pseudo_quantize(x, r, 1)):
        y = quantize(x, range_)
        assert y[0].isnan() and y[1] == 1 and y[2] == -1 and y[3].isfinite()


def test_where_the_kernels_do_not_serve():
    range_ = F.quantization_range(
        torch.tensor([1.0]), torch.tensor([4.0]), Grid.SIGNED, torch.zeros(1)
    )
    x = normal(6, 4)
    assert cpu.serves(x, range_) and cpu.serves(nn.Parameter(x), range_)
    assert not cpu.serves(x.double(), range_)
    assert not cpu.serves(x[:0], range_)
    assert K.hard_quantize(x[:0], range_).shape == (0, 4)
    every_second = normal(6, 8)[:, ::2]
    assert torch.equal(
        K.hard_quantize(every_second, range_), F.hard_quantize(every_second, range_)
    )


def test_boundaries_of_a_dense_tensor_are_found_by_its_strides():
    x = normal(2, 3, 4, 5).contiguous(memory_format=CHANNELS_LAST)
    for axis in range(4):
        shape = [1] * 4
        shape[axis] = x.shape[axis]
        boundary = torch.arange(float(x.shape[axis])).view(shape)
        inner = inner_size(x, boundary)
        flat = boundary.expand_as(x).contiguous(memory_format=CHANNELS_LAST)
        flat = flat.as_strided((x.numel(),), (1,))
        place = torch.arange(x.numel())
        assert torch.equal((place // inner) % x.shape[axis], flat.long())


@pytest.mark.parametrize("quantizer", ["nipq", "lsq"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, CHANNELS_LAST])
def test_a_model_trains_by_the_kernels(monkeypatch, quantizer, memory):
    """Fails where the fast path is silently left."""
    config = QuantConfig(quantizer=quantizer)
    model = prepare(residual_net(), images(), config).to(memory_format=memory)

    def forbidden(*args):
        raise AssertionError("torch operations were used")

    monkeypatch.setattr(F, "pseudo_quantize", forbidden)
    monkeypatch.setattr(F, "hard_quantize", forbidden)
    model(images()).sum().backward()
    model.eval()(images())


def run_apart(code, **environment):
    """Python in a process of its own, since the library is loaded once."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    )


USE = """
import torch
from nipq_search.quant import prepare, QuantConfig
from nipq_search.quant.kernels import build
torch.manual_seed(0)
model = prepare(torch.nn.Linear(64, 8), torch.randn(16, 64), QuantConfig())
for _ in range(2):
    out = model(torch.ones(16, 64) / 3)
print(build.library() is not None, out.detach().double().sum().item())
"""


def test_a_machine_without_a_compiler_warns_once_and_computes_the_same(tmp_path):
    fast = run_apart(USE, XDG_CACHE_HOME=str(tmp_path))
    assert fast.stdout.startswith("True") and not fast.stderr
    assert [path.suffix for path in (tmp_path / "nipq-search").iterdir()] == [".so"]
    none = run_apart(USE, XDG_CACHE_HOME=str(tmp_path / "new"), PATH=str(tmp_path), CC="")
    assert none.stderr.count("run without their fast kernels") == 1
    asked = run_apart(USE, NIPQ_SEARCH_KERNELS="eager")
    assert not asked.stderr
    for slow in (none, asked):
        assert slow.stdout.startswith("False")
        assert float(slow.stdout.split()[1]) == pytest.approx(
            float(fast.stdout.split()[1]), abs=1e-5
        )


def test_a_compiler_that_fails_is_named(tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = run_apart(USE, XDG_CACHE_HOME=str(tmp_path), CC=str(broken))
    assert "no space left" in done.stderr and done.stdout.startswith("False")
    assert not list(tmp_path.glob("nipq-search/*"))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_apart(USE, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.stdout.startswith("True")


def test_the_source_is_part_of_the_package():
    assert build.SOURCE.exists()
