"""Noise of a share of a batch, which equals the noise of its samples in the whole batch."""

from __future__ import annotations

import pytest
import torch
from quant_models import images, normal, residual_net
from test_quant_kernels import ONE, boundary_of

from nipq_search.quant import QuantConfig, prepare
from nipq_search.quant import kernels as K
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.quant.kernels import cpu
from nipq_search.quant.numerics.noise import (
    drawn_from,
    mix,
    residuals_of,
    uniform_noise,
    with_origin,
)

SHARES = ((0, 3), (3, 1), (4, 4))
"""The number of samples before and in each share of a batch of 8 samples."""


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["in C", "in torch"])
def test_shares_make_up_the_whole(dtype, memory):
    x = normal(8, 3, 5, 7).to(dtype).contiguous(memory_format=memory)
    boundary = boundary_of(torch.tensor([1.7], dtype=dtype), 3)
    assert (K.backend_for(x, boundary) is cpu) == (dtype is torch.float32)
    key = mix(1, 2)
    whole = K.pseudo_quantize(x, boundary, key)
    parts = [
        K.pseudo_quantize(x[before : before + count], boundary, with_origin(key, before * 105))
        for before, count in SHARES
    ]
    assert torch.equal(torch.cat(parts), whole)
    wrong = K.pseudo_quantize(x[4:], boundary, key)
    assert not torch.equal(wrong, whole[4:])


@pytest.mark.parametrize("empirical", [False, True])
def test_gradients_of_shares_add_up(empirical):
    x, g, key = normal(8, 40), normal(8, 40, seed=1), mix(3)
    found = [
        K.gradients(g[a : a + n], x[a : a + n], ONE, with_origin(key, 40 * a), empirical)
        for a, n in SHARES
    ]
    whole = K.gradients(g, x, ONE, key, empirical)
    assert torch.equal(torch.cat([f[0] for f in found]), whole[0])
    if not empirical:  # with empirical noise, each share builds its own table
        for index in (1, 2):
            torch.testing.assert_close(sum(f[index] for f in found), whole[index])


@pytest.mark.parametrize("origin", [1, 15, 16, 700_001, 9 << 31])
def test_both_laws_follow_the_origin(origin):
    """Noise with an origin equals the tail of the noise without one, in torch and in C."""
    x, key = normal(200), mix(5)
    table = residuals_of(x, *ONE.range(1)[:3])
    for draw in (
        lambda count, at: drawn_from(table, torch.Size([count]), with_origin(key, at)),
        lambda count, at: uniform_noise(
            torch.Size([count]), with_origin(key, at), x.device, x.dtype
        ),
    ):
        assert torch.equal(draw(200, origin)[23:], draw(177, origin + 23))
    packed = cpu.packed_range(ONE)
    step = packed[0]
    for residuals in (None, table):
        y = cpu.forward(torch.zeros(200), 0, packed, with_origin(key, origin), residuals)
        torch_s = (
            uniform_noise(torch.Size([200]), with_origin(key, origin), x.device, x.dtype)
            if residuals is None
            else drawn_from(table, torch.Size([200]), with_origin(key, origin))
        )
        assert torch.equal(y, torch_s * step)


@pytest.mark.parametrize("quantizer", ["nipq", "diffq"])
def test_a_model_on_shares_computes_what_it_does_on_the_whole(quantizer):
    batch = images(batch=8)
    config = QuantConfig(quantizer=quantizer)
    model = prepare(residual_net(), batch[:2], config=config, calibration=[batch])
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.eval().requires_grad_(False)
        norm.train = lambda mode=True, self=norm: self  # batch statistics differ between shares
    clock = quant_state(model).clock
    model.train()
    step = clock.step
    whole = model(batch)
    for before, count in SHARES:
        clock.step, clock.share = step, (before, count, 8)
        part = model(batch[before : before + count])
        torch.testing.assert_close(part, whole[before : before + count], rtol=1e-4, atol=1e-5)


def test_looked_up_rows_are_a_samples_own():
    """The noise of a row in an embedding's output depends on its position in the batch."""
    tokens = torch.arange(8 * 6).view(8, 6) % 11
    model = torch.nn.Sequential(torch.nn.Embedding(11, 4), torch.nn.Linear(4, 3))
    prepared = prepare(model, tokens[:2], calibration=[tokens]).train()
    clock = quant_state(prepared).clock
    step = clock.step
    whole = prepared(tokens)
    for before, count in SHARES:
        clock.step, clock.share = step, (before, count, 8)
        part = prepared(tokens[before : before + count])
        torch.testing.assert_close(part, whole[before : before + count], rtol=1e-4, atol=1e-5)
    assert clock.batch_ratio() == 2.0
