"""Conformance suite for fake quantizers."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from nipq_search.quant import (
    QUANTIZERS,
    ActivationConfig,
    FakeQuantizer,
    Granularity,
    QuantConfig,
    WeightConfig,
    bit_config,
    param_groups,
    prepare,
    quantizers,
)
from nipq_search.quant.insertion.prepare import freeze_bits
from nipq_search.quant.numerics.functional import Grid
from nipq_search.testing.models import WIDTHS, images, normal, plain_quantize, residual_net

NAME = "quantizer under test"
"""Name under which the suite registers the quantizer."""


def prepared(**options: Any) -> nn.Module:
    """Return a residual net prepared with the quantizer under test.

    `options` are arguments of `QuantConfig`.
    """
    return prepare(residual_net(), images(), QuantConfig(quantizer=NAME, **options))


def trained(**options: Any) -> Any:
    """Return a prepared residual net after three training steps; see `prepared`."""
    model = prepared(**options)
    optimizer = torch.optim.SGD(param_groups(model, lr=0.05), momentum=0.9)
    for seed in range(3):
        optimizer.zero_grad()
        model(images(seed)).square().sum().backward()
        optimizer.step()
    return model


def reference_operand(quantizer: Any, x: Tensor) -> Tensor:
    """Return `x`, quantized by the textbook implementation with the settings of `quantizer`."""
    alpha = quantizer.alpha().detach()
    if quantizer.channels > 1:
        alpha = alpha.view(-1, *[1] * (x.dim() - 1))
    return plain_quantize(x, alpha, quantizer.bits.hard(), quantizer.grid, quantizer.minimum)


def reference_forward(model: Any, x: Tensor) -> Tensor:
    """Return the residual net's output with all operands quantized by `reference_operand`."""

    def conv(layer: Any, x: Tensor) -> Tensor:
        x = reference_operand(layer.input_quantizer, x)
        weight = reference_operand(layer.weight_quantizer, layer.weight)
        return nn.functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding)

    x = torch.relu(model.norm(conv(model.stem, x)))
    x = nn.functional.silu(conv(model.main, x) + conv(model.side, x)).mean((2, 3))
    weight = reference_operand(model.head.weight_quantizer, model.head.weight)
    return nn.functional.linear(
        reference_operand(model.head.input_quantizer, x), weight, model.head.bias
    )


class QuantizerConformance:
    """Properties of every fake quantizer.

    Attributes:
        quantizer: the class under test.
    """

    quantizer: ClassVar[type[FakeQuantizer]]

    @pytest.fixture(autouse=True)
    def _registered(self) -> Iterator[None]:
        with QUANTIZERS.temporarily(NAME, self.quantizer):
            yield

    @pytest.mark.parametrize("granularity", list(Granularity))
    def test_frozen_models_are_hard_quantized(self, granularity: Granularity) -> None:
        """The output of a frozen model equals that of textbook quantization of every operand."""
        for bits, seed in itertools.product(range(2, 15), range(3)):
            config = QuantConfig(
                quantizer=NAME,
                weights=WeightConfig(bits=(bits,), granularity=granularity),
                activations=ActivationConfig(bits=(bits,)),
            )
            model = freeze_bits(prepare(residual_net(seed), images(seed), config)).eval()
            x = images(seed + 100)
            with torch.no_grad():
                assert torch.equal(model(x), reference_forward(model, x))

    @pytest.mark.parametrize(("grid", "bits"), WIDTHS)
    def test_frozen_activations_are_hard_quantized(self, grid: Grid, bits: int) -> None:
        """A frozen activation quantizer gives the textbook result, in training and evaluation."""
        shift = {Grid.SIGNED: 0.0, Grid.UNSIGNED: 5.0, Grid.AFFINE: 1.0}[grid]
        config = QuantConfig(quantizer=NAME, activations=ActivationConfig(bits=(bits,)))
        for seed in range(10):
            x = normal(20, 6, seed=seed).clamp(-2, 2) * 0.8 + shift
            model: Any = freeze_bits(prepare(nn.Linear(6, 2), x, config))
            quantizer = model.input_quantizer
            if grid is not Grid.SIGNED:
                assert quantizer.grid is grid
            for mode in (True, False):
                y = quantizer.train(mode)(x)
                assert torch.equal(y, reference_operand(quantizer, x))

    def test_every_parameter_learns(self) -> None:
        """Every parameter has a finite nonzero gradient.

        For every learned bit-width, `marginal`, the derivative of the task loss with respect to
        the bit-width, is also nonzero. Frozen models still have a gradient for every parameter.
        """
        float_model = residual_net()
        float_model(images()).square().sum().backward()
        learning = {n for n, p in float_model.named_parameters() if _gradient(p).abs().max() > 0}
        model = prepared(pin={"head": 8})
        model(images()).square().sum().backward()
        for parameter_name, parameter in model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None and gradient.isfinite().all(), parameter_name
            assert gradient.abs().max() > 0, parameter_name
            learning.discard(parameter_name)
        assert not learning
        if self.quantizer.learns_bits:
            unpinned = [n for n in quantizers(model) if not n.startswith("head")]
            assert all(quantizers(model)[n].bits.theta is not None for n in unpinned)
            assert all(float(quantizers(model)[n].bits.marginal) != 0 for n in unpinned)
        freeze_bits(model)
        model.zero_grad()
        model(images()).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_training_lowers_the_loss(self) -> None:
        """Training in which the bit-widths are frozen halfway lowers the loss by at least 30 %."""
        model = prepared()
        target = normal(4, 3)
        optimizer = torch.optim.SGD(param_groups(model, lr=0.02), momentum=0.9)
        losses = []
        for step in range(60):
            if step == 30:
                freeze_bits(model)
            optimizer.zero_grad()
            loss = (model(images()) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])

    def test_groups_hold_every_parameter_once(self) -> None:
        """Each parameter is in exactly one group.

        The parameters of quantizers have separate groups without weight decay.
        """
        model = prepared()
        groups = param_groups(model, lr=0.1, weight_decay=1e-4, lr_boundaries=0.2, lr_bits=0.3)
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        by_name = {group["name"]: group for group in groups}
        own = {id(p) for q in quantizers(model).values() for p in q.parameters()}
        for group in groups:
            for parameter in group["params"]:
                if parameter.dim() <= 1 or id(parameter) in own:
                    assert group["weight_decay"] == 0.0
                assert (id(parameter) in own) == (group["name"] in ("boundaries", "bits"))
        assert all(p.dim() == 1 for q in quantizers(model).values() for p in q.parameters())
        assert by_name["decayed"]["weight_decay"] == 1e-4 and by_name["decayed"]["lr"] == 0.1
        assert ("boundaries" in by_name) == self.quantizer.learns_boundary
        assert by_name.get("boundaries", {"lr": 0.2})["lr"] == 0.2
        assert ("bits" in by_name) == self.quantizer.learns_bits
        freeze_bits(model)
        assert "bits" not in {group["name"] for group in param_groups(model, lr=0.1)}

    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("target_frozen", [False, True])
    def test_state_dict_round_trip(
        self, frozen: bool, target_frozen: bool, tmp_path: Path
    ) -> None:
        """A state dict restores parameters, noise and phase in a model that may differ in each.

        Args:
            frozen: whether the saved model is frozen.
            target_frozen: whether the model that loads it is frozen.
            tmp_path: folder for the file.
        """
        source = trained()
        if frozen:
            freeze_bits(source)
        torch.save(source.state_dict(), tmp_path / "state.pt")
        target = prepare(residual_net(9), images(9) - 0.3, QuantConfig(quantizer=NAME, seed=77))
        if target_frozen:
            freeze_bits(target)
        target.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
        assert source.state_dict().keys() == target.state_dict().keys()
        assert bit_config(source) == bit_config(target)
        source.zero_grad()
        for _ in range(2):  # both models continue with the same noise and phase
            outputs = [source(images()), target(images())]
            assert torch.equal(*outputs)
            for y in outputs:
                y.sum().backward()
        pairs = zip(source.named_parameters(), target.named_parameters(), strict=True)
        for (left, a), (right, b) in pairs:
            assert left == right and torch.equal(_gradient(a), _gradient(b))
        assert torch.equal(source.eval()(images()), target.eval()(images()))

    @pytest.mark.parametrize("frozen", [False, True])
    def test_copies_and_pickles(self, frozen: bool) -> None:
        """A deep or pickled copy gives the same output and shares no state with the original."""
        source = trained()
        if frozen:
            freeze_bits(source)
        for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
            again = copy.deepcopy(source)
            assert torch.equal(again(images()), other(images()))
            assert other.quant_state.clock.step == again.quant_state.clock.step
            assert other.quant_state.clock is not source.quant_state.clock
            assert all(q.clock is other.quant_state.clock for q in quantizers(other).values())

    def test_low_precision_keeps_its_type(self) -> None:
        """Quantizers keep the dtype of half-precision inputs; autocast gives float32 outputs."""
        model: Any = prepared()
        quantizer = model.stem.input_quantizer
        for dtype in (torch.bfloat16, torch.float16):
            assert quantizer(images().to(dtype)).dtype is dtype
            assert quantizer.eval()(images().to(dtype)).dtype is dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert quantizer(images()).dtype is torch.float32

    def test_double_precision_works(self) -> None:
        """A model in double precision has gradients, and evaluates in double precision."""
        model = prepared().double()
        x = images().double()
        model(x).sum().backward()
        assert model.eval()(x).dtype is torch.float64

    def test_zeros_and_empty_tensors(self) -> None:
        """Calibration on zeros gives finite gradients, and empty batches keep their shape."""
        model = prepare(nn.Linear(4, 2), torch.zeros(3, 4), QuantConfig(quantizer=NAME))
        model(torch.zeros(3, 4)).sum().backward()
        assert all(_gradient(p).isfinite().all() for p in model.parameters())
        assert model.eval()(torch.zeros(0, 4)).shape == (0, 2)

    def test_a_boundary_that_collapsed_gives_numbers(self) -> None:
        """Outputs and gradients stay finite when every boundary has collapsed toward zero."""
        model = prepared()
        with torch.no_grad():
            for quantizer in quantizers(model).values():
                for parameter in quantizer.parameters(recurse=False):
                    is_boundary = parameter is getattr(quantizer, "boundary", None)
                    parameter.fill_(-1e4 if is_boundary else 0.0)
        for training in (True, False):
            y = model.train(training)(images())
            y.sum().backward()
            assert y.isfinite().all()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
