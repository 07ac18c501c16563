"""Learned bit-widths: sampling, freezing, and the running mean of the gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from quant_models import images, residual_net

from nipq_search.errors import UserError
from nipq_search.quant import ActivationConfig, QuantConfig, WeightConfig, param_groups, prepare
from nipq_search.quant import quantizers as find_quantizers
from nipq_search.quant.insertion.prepare import freeze_bits
from nipq_search.quant.numerics.noise import centered_uniform
from nipq_search.quant.quantizers.bit_width import BitWidth, check_bits


@pytest.mark.parametrize("allowed", [(2, 3, 4, 5, 6, 7, 8), (4, 8)])
def test_samples_are_unbiased_and_in_range(allowed):
    bits = BitWidth(allowed, start=5.3)
    draws = torch.cat([bits.sample(centered_uniform(k), k).detach() for k in range(4000)])
    assert set(draws.tolist()) <= set(map(float, allowed))
    assert float(draws.mean()) == pytest.approx(float(bits.soft().detach()), abs=0.12)


def test_start_is_clipped():
    assert float(BitWidth((2, 14), start=14).soft().detach()) == pytest.approx(2 + 12 * 0.95)
    assert float(BitWidth((2, 14), start=8).theta.detach()) == pytest.approx(0.0)


def test_one_width_has_no_parameter():
    bits = BitWidth((6,), start=8)
    assert list(bits.parameters()) == []
    assert bits.hard() == 6 and float(bits.soft()) == 6.0


def test_marginal_is_a_running_mean_of_the_task_gradient_alone():
    bits = BitWidth((2, 8), start=5)
    for step in range(3):
        loss = (3.0 * bits.sample(0.1, step)).sum() + 100 * bits.soft().sum()
        loss.backward()
    assert float(bits.marginal) == pytest.approx(3.0 * (1 - 0.98**3), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_frozen_bits_never_move(optimizer):
    model = prepare(residual_net(), images())
    groups = param_groups(model, lr=0.5)
    made = {
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
        "adam": lambda: torch.optim.Adam(groups),
    }[optimizer]()

    def step():
        made.zero_grad(set_to_none=False)
        loss = model(images()).square().sum()
        (loss + sum(q.bits.soft().sum() for q in find_quantizers(model).values())).backward()
        made.step()

    for _ in range(3):
        step()
    freeze_bits(model)
    before = {n: q.bits.hard() for n, q in find_quantizers(model).items()}
    buffers = {n: b.clone() for n, b in model.named_buffers() if n.endswith(".frozen")}
    assert buffers and all(not b.is_floating_point() for b in buffers.values())
    for _ in range(5):
        made.zero_grad(set_to_none=False)
        model(images()).square().sum().backward()
        made.step()
    after = dict(model.named_buffers())
    assert before == {n: q.bits.hard() for n, q in find_quantizers(model).items()}
    assert all(torch.equal(after[name], value) for name, value in buffers.items())
    assert not any("theta" in name for name, _ in model.named_parameters())


def test_freezing_is_final():
    bits = BitWidth((2, 4, 8))
    with pytest.raises(UserError, match=r"3 is not allowed; choose from \[2, 4, 8\]"):
        bits.freeze(3)
    bits.freeze(4)
    bits.freeze(4)
    with pytest.raises(UserError, match="frozen at 4 and cannot change to 8"):
        bits.freeze(8)
    with pytest.raises(UserError, match="cannot be learned again"):
        bits.start_at(8)
    assert bits.hard() == 4


def test_start_at_survives_a_state_dict():
    for learned in (True, False):
        source = BitWidth((2, 4, 8), learned=learned)
        source.start_at(4)
        target = BitWidth((2, 4, 8), learned=learned)
        target.load_state_dict(source.state_dict())
        assert target.hard() == source.hard() == 4


def test_a_checkpoint_with_other_widths_is_refused():
    source, target = BitWidth((3, 5)), BitWidth((4, 8))
    source.freeze(3)
    with pytest.raises(RuntimeError, match=r"3 bits are not allowed; choose from \[4, 8\]"):
        target.load_state_dict(source.state_dict())


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ((), "no bit-width is allowed"),
        ((0, 4), "0 is not a bit-width"),
        ((4, 17), "17 is not a bit-width"),
        ((4.0,), "4.0 is not a bit-width"),
        (("4",), "'4' is not a bit-width"),
        ((True,), "True is not a bit-width"),
        ((4, 4), "repeats a bit-width"),
    ],
)
def test_bad_sets_are_refused(bits, message):
    with pytest.raises(UserError, match=message):
        check_bits(bits, "x")


def test_sets_are_sorted():
    assert check_bits([8, 2, 4], "x") == (2, 4, 8)


def test_config_errors_name_the_key():
    cases = {
        "quant.weights.bits": lambda: WeightConfig(bits=(1, 2)),
        "quant.weights.granularity.*did you mean 'per_channel'": lambda: WeightConfig(
            granularity="perchannel"
        ),
        "quant.weights.start": lambda: WeightConfig(start="x"),
        "quant.activations.percentile": lambda: ActivationConfig(percentile=1.5),
        "quant.quantizer.*did you mean 'nipq'": lambda: QuantConfig(quantizer="nipk"),
        "quant.proxy": lambda: QuantConfig(proxy="gauss"),
        "quant.start_bits": lambda: QuantConfig(start_bits=20),
        "quant.input_bits": lambda: QuantConfig(input_bits=0),
        "quant.pin.head: give": lambda: QuantConfig(pin={"head": "eight"}),
        "quant.pin.head: weights need": lambda: QuantConfig(pin={"head": 1}),
        "quant.pin.head: 40": lambda: QuantConfig(pin={"head": 40}),
    }
    for message, make in cases.items():
        with pytest.raises(UserError, match=message):
            make()


def test_going_back_is_the_same_as_a_resume():
    model, x = prepare(residual_net(), images()).train(), images()

    def step(of):
        of(x).square().sum().backward()

    step(model)
    state = copy.deepcopy(model.state_dict())
    fresh = copy.deepcopy(model)
    step(model)
    for each in (model, fresh):
        each.load_state_dict(state)
        step(each)
    for a, b in zip(find_quantizers(model).values(), find_quantizers(fresh).values(), strict=True):
        assert torch.equal(a.bits.marginal, b.bits.marginal)
