"""Training in bfloat16: which operations use it and which stay in float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from train_tasks import CPU, Regression, SpiedDigits, digits_spec, mlp_spec

from nipq_search.quant import quantizers
from nipq_search.quant.kernels import cpu
from nipq_search.train import FloatConfig, Hooks, TrainSpec, train
from nipq_search.train.checkpoint import from_bytes
from nipq_search.train.models import load_trained


class Watched(Regression):
    """Records the dtype of the model's output, in training and in evaluation."""

    def __init__(self):
        super().__init__()
        self.seen = {"loss": [], "evaluate": []}

    def loss(self, model, batch):
        self.seen["loss"].append(model(batch["x"]).dtype)
        return super().loss(model, batch)

    def evaluate(self, model, split):
        self.seen["evaluate"].append(model(torch.zeros(1, 4)).dtype)
        return super().evaluate(model, split)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantized", [True, False])
def test_forwards_and_losses_use_bfloat16_but_parameters_do_not(precision, quantized, tmp_path):
    task, curve = Watched(), []
    wanted = getattr(torch, precision)
    if quantized:
        spec = mlp_spec(precision=precision)
    else:
        config = FloatConfig(precision=precision, epochs=2, batch_size=32, lr=0.01)
        spec = TrainSpec(train=config.as_training(), seed=1)
    result = train(task, spec, tmp_path, CPU, Hooks(on_epoch=curve.append))
    calibration = [torch.float32] * 4 if quantized else []
    assert task.seen["loss"] == calibration + [wanted] * result.steps
    assert task.seen["evaluate"] == [wanted] * (len(curve) + 1)
    stored = from_bytes((tmp_path / "model.pt").read_bytes())["model"]
    kinds = {value.dtype for value in stored.values() if isinstance(value, torch.Tensor)}
    assert torch.float32 in kinds and torch.bfloat16 not in kinds
    assert load_trained(task, spec, tmp_path / "model.pt", CPU)(torch.zeros(1, 4)).dtype == (
        torch.float32
    )


def test_quantizers_compute_in_float32(digits, float_model, tmp_path, monkeypatch):
    kinds = []

    def spied(x, *rest, original=cpu.forward):
        result = original(x, *rest)
        kinds.append((x.dtype, result.dtype))
        return result

    monkeypatch.setattr(cpu, "forward", spied)
    train(digits, digits_spec(float_model, epochs=1, precision="bfloat16"), tmp_path, CPU)
    assert set(kinds) == {(torch.float32, torch.float32)}


def test_bfloat16_is_close_to_float32_and_reproducible(float_model, tmp_path):
    specs = [digits_spec(float_model, precision=p) for p in ("float32", "bfloat16", "bfloat16")]
    results = [
        train(SpiedDigits(), spec, tmp_path / str(index), CPU) for index, spec in enumerate(specs)
    ]
    assert results[1] == results[2]
    assert results[0].model_sha256 != results[1].model_sha256
    accuracy = [result.metrics["accuracy"] for result in results]
    assert accuracy[1] == pytest.approx(accuracy[0], abs=0.05)
    assert results[1].cost["bops"] <= specs[1].budget["bops"]


def test_a_float_file_is_evaluated_in_bfloat16(float_model, digits, tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16"):
        spec = TrainSpec(
            train=FloatConfig(precision=precision).as_training(), seed=1, float_model=float_model
        )
        losses[precision] = train(digits, spec, tmp_path / precision, CPU).metrics["loss"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]


def test_lsq_trains_in_bfloat16(float_model, digits, tmp_path):
    quant = dataclasses.replace(digits_spec(None).quant, quantizer="lsq", start_bits=4)
    spec = digits_spec(float_model, epochs=1, precision="bfloat16", quant=quant, budget=None)
    train(digits, spec, tmp_path, CPU)
    model = load_trained(digits, spec, tmp_path / "model.pt", CPU)
    assert {q.bits.hard() for q in quantizers(model).values()} == {4}
