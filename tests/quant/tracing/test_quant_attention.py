"""Agreement of attention written as two products with torch's fused functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from quant_models import normal
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nipq_search.quant import prepare, quantizers
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.quant.tracing.attention import attention, multi_head_attention

Q, K, V = (normal(2, 4, 5, 8, seed=s) for s in range(3))
ALLOWED = torch.ones(5, 5, dtype=torch.bool).tril(1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": ALLOWED},
        {"attn_mask": normal(2, 1, 5, 5, seed=7)},
        {"attn_mask": torch.zeros(5, 5).masked_fill(~ALLOWED, float("-inf"))},
        {"attn_mask": ALLOWED & (torch.arange(5) > 1)[:, None]},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_attention_as_torch_computes_it(options):
    torch.testing.assert_close(
        attention(Q, K, V, **options), nnf.scaled_dot_product_attention(Q, K, V, **options)
    )


def test_grouped_heads():
    key, value = K[:, :2], V[:, :2]
    torch.testing.assert_close(
        attention(Q, key, value, enable_gqa=True),
        nnf.scaled_dot_product_attention(Q, key, value, enable_gqa=True),
    )


def test_dropout_drops():
    assert not torch.equal(attention(Q, K, V, dropout_p=0.5), attention(Q, K, V))


PADDING = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])


def calls():
    """Yield a name, module options, and positional and keyword arguments of one call."""
    x, memory = normal(2, 5, 16), normal(2, 6, 16, seed=1)
    yield "self", {}, (x, x, x), {}
    yield "cross", {}, (x, memory, memory), {"key_padding_mask": PADDING}
    yield "differing", {}, (x, memory, memory + 1), {"average_attn_weights": False}
    yield "sizes", {"kdim": 7, "vdim": 9}, (x, normal(2, 6, 7), normal(2, 6, 9)), {}
    yield "appended", {"add_bias_kv": True, "add_zero_attn": True}, (x, memory, memory), {}
    yield "causal", {}, (x, x, x), {"attn_mask": ~ALLOWED, "is_causal": True}
    yield "by head", {}, (x, x, x), {"attn_mask": normal(8, 5, 5, seed=3)}
    yield "unseen", {"bias": False}, (x, x, x), {"need_weights": False}
    yield "single", {}, (x[0], x[0], x[0]), {}
    yield "time first", {"batch_first": False}, (x, x, x), {}
    both = {"key_padding_mask": PADDING, "attn_mask": normal(5, 6, seed=4) > 1}
    yield "both masks", {}, (x, memory, memory), both


@pytest.mark.parametrize(
    ("options", "args", "kwargs"), [c[1:] for c in calls()], ids=[c[0] for c in calls()]
)
def test_multi_head_attention_as_torch_computes_it(options, args, kwargs, monkeypatch):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, **{"batch_first": True, **options})
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = module(*args, **kwargs)
    monkeypatch.setattr(nnf, "multi_head_attention_forward", multi_head_attention)
    found = module(*args, **kwargs)
    torch.testing.assert_close(found[0], expected[0])
    if expected[1] is None:
        assert found[1] is None
    else:
        torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("training", [True, False])
def test_a_prepared_module_with_its_quantizers_off_is_the_float_module(training):
    module = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = normal(2, 5, 16)
    prepared = prepare(module, x).train(training)
    for quantizer in quantizers(prepared).values():
        quantizer.observer = lambda x: None
    torch.testing.assert_close(prepared(x), module.train()(x))


def test_every_operand_of_attention_is_quantized():
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    prepared = prepare(module, (normal(2, 5, 16),) * 3)
    assert set(quantizers(prepared)) == {
        "in_proj.weight",
        "in_proj.input",
        "scores.input",
        "scores.second",
        "values.input",
        "values.second",
        "out_proj.weight",
        "out_proj.input",
    }
    seen = set()
    for name, quantizer in quantizers(prepared).items():
        quantizer.observer = lambda x, name=name: seen.add(name)
    prepared.eval()(*(normal(2, 5, 16),) * 3)
    assert seen == set(quantizers(prepared))


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (nn.MultiheadAttention(16, 4, batch_first=True), (normal(2, 5, 16),) * 3),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (normal(2, 5, 16),)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2),
         (normal(2, 5, 16),)),
    ],
)  # fmt: skip
def test_torch_counts_fused_kernels_as_we_count_their_parts(model, args):
    macs = sum(layer.macs for layer in quant_state(prepare(model, args)).graph.layers)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(*args)
    assert counter.get_total_flops() == 2 * 2 * macs
    counter = FlopCounterMode(display=False)
    with counter:
        model.train()(*args)
    assert counter.get_total_flops() == 2 * 2 * macs
