"""Starting bit-widths: sensitivity scores, a single width, and profiles."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

from nipq_search.cost import Budget
from nipq_search.cost.base import exact_cost, hard_bits, uniform_bits
from nipq_search.cost.projection import assign, is_tight, units_of, usage
from nipq_search.errors import UserError
from nipq_search.quant import ActivationConfig, QuantConfig, WeightConfig, quantizers
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.tasks.vision.digits import Digits
from nipq_search.train import Hooks, Interrupted, TrainConfig, TrainSpec, train
from nipq_search.train.models import load_float, load_trained, prepare_for
from nipq_search.train.sensitivity import monotone, score

CPU = torch.device("cpu")
QUANT = QuantConfig(
    weights=WeightConfig(bits=(2, 3, 4, 5, 6)), activations=ActivationConfig(bits=(2, 3, 4, 5, 6))
)
SHORT = TrainConfig(epochs=0.4, batch_size=128, norm_batches=1, calibration_batches=1)


@pytest.fixture(scope="module")
def digits():
    task = Digits(width=4)
    task.load_data()
    return task


@pytest.fixture(scope="module")
def float_file(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    train(
        digits,
        TrainSpec(train=TrainConfig(epochs=12, batch_size=64, lr=0.1, distill=False), seed=0),
        folder,
        CPU,
    )
    return folder / "model.pt"


def spec_of(float_file, budget=None, **train_options):
    return TrainSpec(
        train=dataclasses.replace(SHORT, **train_options),
        seed=1,
        quant=QUANT,
        budget=budget,
        float_model=float_file,
    )


@pytest.fixture(scope="module")
def losses(digits, float_file):
    return score(digits, spec_of(float_file, batch_size=256), CPU, Hooks())


def prepared_for(digits, spec):
    return prepare_for(digits, load_float(digits, spec.float_model, 0, CPU), spec, CPU)[0]


def bops(digits, float_file, width):
    graph = quant_state(prepared_for(digits, spec_of(float_file))).graph
    return {"bops": exact_cost("bops", graph, uniform_bits(graph, width))}


def test_scores_cover_every_unit_and_fall_with_the_width(digits, float_file, losses):
    graph = quant_state(prepared_for(digits, spec_of(float_file))).graph
    assert losses.keys() == units_of(graph).keys()
    for unit, of_unit in losses.items():
        assert tuple(of_unit) == graph.tensors[unit].allowed
        values = list(of_unit.values())
        assert values == sorted(values, reverse=True) and values[-1] >= 0
    assert max(of_unit[2] for of_unit in losses.values()) > 0.01


def test_every_score_is_counted(digits, float_file):
    counted = []
    spec = spec_of(float_file, batch_size=64, score_batches=2)
    losses = score(digits, spec, CPU, Hooks(on_samples=counted.append))
    widths = sum(len(of_unit) for of_unit in losses.values())
    assert sum(counted) == 64 + (widths + 1) * 2 * 64


def test_scoring_can_be_stopped(digits, float_file):
    with pytest.raises(Interrupted):
        score(digits, spec_of(float_file), CPU, Hooks(should_stop=lambda: True))


def test_scores_do_not_increase_with_the_width():
    assert monotone({2: 0.5, 3: 0.1, 4: 0.2, 8: -0.3}) == {2: 0.5, 3: 0.2, 4: 0.2, 8: 0.0}
    for ruined in (float("nan"), float("inf")):
        found = monotone({2: ruined, 4: 0.2, 8: 0.1})
        assert found[2] > 100 and math.isfinite(found[2])
        assert (found[4], found[8]) == (0.2, 0.1)


def test_scores_give_the_bits_of_least_loss(digits, float_file, losses):
    budget = bops(digits, float_file, 3)
    spec = dataclasses.replace(
        spec_of(float_file, budget, start="sensitivity"),
        quant=dataclasses.replace(QUANT, quantizer="lsq"),
        losses=losses,
    )
    model = prepared_for(digits, spec)
    graph, bits = quant_state(model).graph, hard_bits(model)
    assert all(quantizer.bits.is_frozen for quantizer in quantizers(model).values())
    assert bits == assign(graph, Budget(**budget), losses)
    assert is_tight(graph, bits, Budget(**budget))
    predicted = sum(losses[unit][bits[unit]] for unit in losses)
    assert predicted < sum(of_unit[3] for of_unit in losses.values())


def test_scores_seed_what_is_learned(digits, float_file, losses):
    budget = bops(digits, float_file, 3)
    spec = spec_of(float_file, budget, start="sensitivity")
    model = prepared_for(digits, dataclasses.replace(spec, losses=losses))
    wanted = assign(quant_state(model).graph, Budget(**budget), losses)
    for name, quantizer in quantizers(model).items():
        assert quantizer.bits.theta is not None
        assert float(quantizer.bits.soft().detach()) == pytest.approx(wanted[name], abs=0.25)


def test_missing_or_foreign_scores_are_refused(digits, float_file, losses):
    spec = spec_of(float_file, bops(digits, float_file, 3), start="sensitivity")
    with pytest.raises(UserError, match="needs scores, which only a sweep"):
        prepared_for(digits, spec)
    some = dict(list(losses.items())[1:])
    with pytest.raises(UserError, match="different model"):
        prepared_for(digits, dataclasses.replace(spec, losses=some))


@pytest.mark.parametrize("quantizer", ["nipq", "lsq"])
def test_one_width_stays_the_same_for_all(digits, float_file, tmp_path, quantizer):
    spec = dataclasses.replace(
        spec_of(float_file, bops(digits, float_file, 3.7), start="uniform", epochs=3, lr=0.1),
        quant=dataclasses.replace(QUANT, quantizer=quantizer),
    )
    result = train(digits, spec, tmp_path, CPU)
    model = load_trained(digits, spec, tmp_path / "model.pt", CPU)
    assert set(hard_bits(model).values()) == {3}
    assert usage(quant_state(model).graph, hard_bits(model), Budget(**spec.budget)) <= 1
    assert result.metrics["accuracy"] > 0.5


def test_one_width_starts_from_a_wider_parent(digits, float_file, tmp_path):
    lsq = dataclasses.replace(QUANT, quantizer="lsq")
    wide = dataclasses.replace(
        spec_of(float_file, bops(digits, float_file, 5), start="uniform"), quant=lsq
    )
    train(digits, wide, tmp_path, CPU)
    parent = load_trained(digits, wide, tmp_path / "model.pt", CPU)
    child = prepared_for(
        digits,
        dataclasses.replace(
            wide, budget=bops(digits, float_file, 3), parent=tmp_path / "model.pt"
        ),
    )
    assert set(hard_bits(child).values()) == {3}
    x = torch.zeros(8, 1, 1, 1)
    for name, quantizer in quantizers(child).items():
        if len(quantizer.bits.allowed) > 1:
            mine, theirs = (
                q.boundary_for(x).range(4).high.mean()
                for q in (quantizer, quantizers(parent)[name])
            )
            assert 0.15 * theirs < mine < theirs, "fewer levels need a narrower range"


def starts(model):
    """Return the starting bit-widths, rounded: learned ones avoid the ends of their range."""
    return {name: round(float(q.bits.soft().detach())) for name, q in quantizers(model).items()}


@pytest.mark.parametrize("noise_share", [0.0, 0.5])
def test_a_child_keeps_the_widths_of_a_parent_at_the_same_budget(
    digits, float_file, tmp_path, noise_share
):
    """They may have been learned, whereas a new projection would ignore the data."""
    budget = bops(digits, float_file, 3)
    parent = spec_of(float_file, budget, noise_share=0.5, epochs=3, lr_bits=0.5)
    train(digits, parent, tmp_path, CPU)
    model = load_trained(digits, parent, tmp_path / "model.pt", CPU)
    graph, learned = quant_state(model).graph, hard_bits(model)
    cost = exact_cost("bops", graph, learned)
    child = dataclasses.replace(
        spec_of(float_file, {"bops": cost}, noise_share=noise_share),
        parent=tmp_path / "model.pt",
    )
    assert starts(prepared_for(digits, child)) == learned
    plain = prepared_for(digits, spec_of(float_file, {"bops": cost}, noise_share=0.0))
    assert hard_bits(plain) != learned, "otherwise the test is vacuous"
    smaller = prepared_for(
        digits, dataclasses.replace(child, budget=bops(digits, float_file, 2.5))
    )
    assert starts(smaller) != learned


@pytest.mark.parametrize("quantizer", ["nipq", "lsq"])
def test_fitted_ranges_lower_the_error_of_rounding(digits, float_file, quantizer):
    """Check every weight, from a float model (NIPQ) and from a parent at another width."""
    quant = dataclasses.replace(QUANT, quantizer=quantizer)

    def errors(model):
        found = {}
        for module in model.modules():
            if (weight := getattr(module, "weight", None)) is not None and weight.dim() == 4:
                rounded = module.weight_quantizer.eval()(weight)
                error = (rounded - weight).detach().square().mean()
                found[module.weight_quantizer.name] = float(error)
        return found

    budget = bops(digits, float_file, 2.2)
    spec = dataclasses.replace(spec_of(float_file, budget), quant=quant)
    plain = errors(prepared_for(digits, spec))
    fitted = errors(
        prepared_for(
            digits,
            dataclasses.replace(spec, train=dataclasses.replace(spec.train, fit_ranges=True)),
        )
    )
    assert len(plain) > 3
    if quantizer == "nipq":
        assert all(fitted[name] < plain[name] for name in plain)
    else:
        assert fitted == plain, "LSQ keeps its published starting values"


def test_no_single_width_meets_the_budget(digits, float_file):
    pinned = dataclasses.replace(QUANT, weights=WeightConfig(bits=(4, 6)))
    spec = spec_of(float_file, bops(digits, float_file, 3), start="uniform")
    with pytest.raises(UserError, match=r"no single bit-width of \[4, 6\]"):
        prepared_for(digits, dataclasses.replace(spec, quant=pinned))


def test_a_profile_is_shifted_onto_the_budget(digits, float_file):
    budget = bops(digits, float_file, 4)
    spec = spec_of(float_file, budget)
    units = list(units_of(quant_state(prepared_for(digits, spec)).graph))
    profile = {unit: 2 + index % 5 for index, unit in enumerate(units)}
    lsq = dataclasses.replace(QUANT, quantizer="lsq")
    model = prepared_for(digits, dataclasses.replace(spec, quant=lsq, profile=profile))
    bits = hard_bits(model)
    assert is_tight(quant_state(model).graph, bits, Budget(**budget))
    # The rest of the budget goes to small tensors, independently of their profile.
    low, high = (
        statistics.median(bits[unit] for unit in units if profile[unit] == width)
        for width in (2, 6)
    )
    assert low + 2 < high
