"""Prepared models in DDP, torch.compile and averaged copies; transfer of bit configurations."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.distributed as dist
from quant_models import images, residual_net
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nipq_search.errors import UserError
from nipq_search.quant import (
    LSQ,
    ActivationConfig,
    QuantConfig,
    WeightConfig,
    apply_bit_config,
    bit_config,
    param_groups,
    prepare,
    quantizers,
    unwrap,
)
from nipq_search.quant.insertion.prepare import freeze_bits, is_frozen


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(kind, model):
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "compile":
        return torch.compile(model, backend="eager")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


@pytest.mark.parametrize("kind", ["ddp", "compile", "ema"])
def test_wrappers(kind, request):
    if kind == "ddp":
        request.getfixturevalue("one_process")
    model = prepare(residual_net(), images())
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings raised inside the compiler
        outer = wrapped(kind, model)
        inner = unwrap(outer)
        if kind != "ema":
            assert inner is model
        for _ in range(10):  # the compiler stops recompiling after several changes
            outputs = [outer(images()), plain(images())]
            assert torch.equal(*outputs)
            for y in outputs:
                y.square().sum().backward()
        for a, b in zip(inner.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        assert bit_config(outer) == bit_config(plain)
        assert len(param_groups(outer, lr=0.1)) == len(param_groups(plain, lr=0.1))
        freeze_bits(outer)
        assert is_frozen(outer)
        outer.eval()
        freeze_bits(plain).eval()
        assert torch.equal(outer(images()), plain(images()))


def test_averaged_models_follow():
    model = prepare(residual_net(), images())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update_parameters(model)  # the first update copies the parameters
    assert bit_config(average) == bit_config(model)


def test_unprepared_models_are_refused():
    with pytest.raises(UserError, match="not prepared"):
        unwrap(residual_net())


@pytest.mark.parametrize("quantizer", ["nipq", "lsq"])
def test_bit_config_round_trip(quantizer):
    source = prepare(residual_net(), images(), QuantConfig(quantizer=quantizer))
    for index, found in enumerate(quantizers(source).values()):
        found.freeze(2 + index % 7)
    carried = json.loads(json.dumps(bit_config(source)))
    assert carried["activations"]["main"] == carried["activations"]["side"]
    target = prepare(residual_net(), images(), QuantConfig(quantizer=quantizer))
    assert apply_bit_config(target, carried) is target
    assert is_frozen(target) and bit_config(target) == carried
    assert torch.equal(source.eval()(images()), target.eval()(images()))
    apply_bit_config(target, carried)  # applying the same widths again is permitted
    warm = prepare(residual_net(), images(), QuantConfig(quantizer=quantizer))
    with torch.no_grad():  # simulates training: an untrained LSQ step would be re-initialized
        for found in quantizers(warm).values():
            for parameter in found.parameters(recurse=False):
                parameter.mul_(1.1)
    boundaries = {n: q.alpha().detach().clone() for n, q in quantizers(warm).items()}
    apply_bit_config(warm, carried, freeze=False)
    assert not is_frozen(warm) and bit_config(warm) == carried
    for name, found in quantizers(warm).items():
        torch.testing.assert_close(found.alpha().detach(), boundaries[name])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lsq_starts_at_the_published_value_of_the_width_that_it_is_given(bits):
    fixed = QuantConfig(
        quantizer="lsq",
        weights=WeightConfig(bits=(bits,)),
        activations=ActivationConfig(bits=(bits,)),
    )
    expected = prepare(residual_net(), images(), fixed)
    given = prepare(residual_net(), images(), QuantConfig(quantizer="lsq"))
    apply_bit_config(given, bit_config(expected))
    for name, found in quantizers(given).items():
        torch.testing.assert_close(found.step, quantizers(expected)[name].step)


def test_warm_starts_are_clipped():
    model = prepare(residual_net(), images())
    bits = bit_config(model)
    bits["weights"]["stem"] = 8
    bits["activations"] = dict.fromkeys(bits["activations"], 5.5)
    apply_bit_config(model, bits, freeze=False)
    soft = {n: float(q.bits.soft().detach()) for n, q in quantizers(model).items()}
    assert soft["stem.weight"] == pytest.approx(2 + 6 * 0.95)
    assert soft["main.input"] == pytest.approx(5.5)


def test_bad_bit_configs_change_nothing():
    config = QuantConfig(weights=WeightConfig(bits=(2, 4, 8)))
    model = prepare(residual_net(), images(), config)
    good = bit_config(model)
    before = {n: v.clone() for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)}

    def broken(part, layer, width):
        bad = copy.deepcopy(good)
        bad[part][layer] = width
        return bad

    missing = copy.deepcopy(good)
    del missing["weights"]["head"]
    cases = [
        ({"weights": {}}, True, "weights.head is missing|'activations' is missing"),
        (missing, True, "weights.head is missing"),
        (broken("weights", "haed", 4), True, "weights.haed: no such layer .*'head'"),
        (broken("weights", "head", 3), True, r"weights.head: 3 bits are not allowed"),
        (broken("weights", "head", "4"), False, "weights.head: '4' is not a bit-width"),
        (broken("activations", "side", 2), True, "activations.side: 2 bits, but another layer"),
    ]
    for bad, freeze, message in cases:
        with pytest.raises(UserError, match=message):
            apply_bit_config(model, bad, freeze=freeze)
    after = model.state_dict()
    assert all(torch.equal(after[n], v) for n, v in before.items())
    apply_bit_config(model, good)
    for freeze in (True, False):
        with pytest.raises(UserError, match="already frozen at 8 bits"):
            apply_bit_config(model, broken("weights", "head", 4), freeze=freeze)


def test_float_layers_have_no_bits():
    model = prepare(residual_net(), images(), QuantConfig(pin={"head": "float"}, input_bits=8))
    bits = bit_config(model)
    assert set(bits["weights"]) == {"stem", "main", "side"}
    assert set(bits["activations"]) == {"main", "side"}
    apply_bit_config(model, bits)


class TestLSQ:
    """LSQ uses the initial value, the gradient scale and the gradient of the paper."""

    def quantizer(self, bits=4, granularity="per_tensor"):
        config = QuantConfig(
            quantizer="lsq", weights=WeightConfig(bits=(bits,), granularity=granularity)
        )
        model = prepare(nn.Linear(30, 5), torch.rand(8, 30), config)
        return model, model.weight_quantizer

    def test_start(self):
        model, quantizer = self.quantizer()
        weight = model.weight.detach()
        assert float(quantizer.step.detach()) == pytest.approx(
            2 * float(weight.abs().mean()) / 7**0.5
        )
        model, quantizer = self.quantizer(granularity="per_channel")
        expected = 2 * model.weight.detach().abs().mean(1) / 7**0.5
        torch.testing.assert_close(quantizer.step.detach(), expected)

    @pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
    def test_gradient(self, granularity):
        model, quantizer = self.quantizer(granularity=granularity)
        weight, step = model.weight.detach(), quantizer.step.detach()
        step = step[:, None] if len(step) > 1 else step
        upstream = torch.rand(5, 30)
        (quantizer(model.weight) * upstream).sum().backward()
        ratio = weight / step
        local = torch.where(ratio <= -7, -7.0, torch.where(ratio >= 7, 7.0, ratio.round() - ratio))
        count = 30 if len(quantizer.step) > 1 else 150
        expected = (local * upstream).sum_to_size(step.shape).reshape(-1) / (count * 7) ** 0.5
        torch.testing.assert_close(quantizer.step.grad, expected)
        inside = (ratio > -7) & (ratio < 7)
        torch.testing.assert_close(model.weight.grad, upstream * inside)

    def test_activations_count_features_per_sample(self):
        model, _ = self.quantizer()
        quantizer = model.input_quantizer
        x = torch.rand(8, 30)
        quantizer(x).sum().backward()
        step, levels = quantizer.step.detach(), 2 ** quantizer.bits.hard() - 1
        ratio = x / step
        local = torch.where(ratio >= levels, float(levels), ratio.round() - ratio)
        expected = local.sum().reshape(1) / (30 * levels) ** 0.5
        torch.testing.assert_close(quantizer.step.grad, expected, rtol=1e-4, atol=1e-5)

    def test_bits_do_not_learn(self):
        assert not LSQ.learns_bits
        config = QuantConfig(quantizer="lsq")
        model = prepare(residual_net(), images(), config)
        assert not any("theta" in name for name, _ in model.named_parameters())
