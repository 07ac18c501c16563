"""Resuming: an interrupted training run is bit-identical to an uninterrupted one."""

from __future__ import annotations

import logging

import pytest
import torch
from train_tasks import CPU, Regression, SpiedDigits, digits_spec, interrupted, mlp_spec, outcome

from nipq_search.file_io import digest
from nipq_search.quant import QuantConfig
from nipq_search.train import FloatConfig, Hooks, Interrupted, TrainSpec, train, trial
from nipq_search.train.checkpoint import load_checkpoint, save_checkpoint

KINDS = {
    "uniform": {"proxy": "uniform"},
    "empirical": {"proxy": "empirical"},
    "lsq": {"quant": QuantConfig(quantizer="lsq", start_bits=4), "budget": None},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    # 5 steps per epoch, the last with one batch; bit-widths are frozen after 8 of 15 steps.
    "all": {"optimizer": "adamw", "lr": 0.01, "accumulate": 2, "precision": "bfloat16"}
    | {"ema": 0.9, "grad_clip": 1.0},
    "lsq, budget": {"quant": QuantConfig(quantizer="lsq")},
    "lsq, all": {"quant": QuantConfig(quantizer="lsq", start_bits=4), "budget": None}
    | {"accumulate": 2, "precision": "bfloat16", "ema": 0.9},
}
MOMENTS = {
    "within the noise phase": [4],
    "at the end of an epoch": [9],
    "right at the freeze": [14],
    "within the tuning phase": [20],
    "at every moment": [4, 5, 5, 6],
    "of 15, within the noise phase": [3],
    "of 15, right at the freeze": [8],
    "of 15, just after the freeze": [9],
    "of 15, within the tuning phase": [12],
    "of 15, at every moment": [3, 2, 3, 1, 3],
}


@pytest.fixture(scope="module")
def whole(float_model, tmp_path_factory):
    """Result and curve of an uninterrupted training run, for each kind."""
    found = {}
    for kind, changes in KINDS.items():
        folder, curve = tmp_path_factory.mktemp(kind), []
        spec = digits_spec(float_model, **changes)
        result = train(SpiedDigits(), spec, folder, CPU, Hooks(on_epoch=curve.append))
        assert digest((folder / "model.pt").read_bytes()) == result.model_sha256
        found[kind] = result, curve
    return found


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        *(("all" if "15" in moment else "uniform", moment) for moment in MOMENTS),
        ("empirical", "at every moment"),
        ("lsq", "at every moment"),
        ("lsq, budget", "at every moment"),
        ("adamw", "at every moment"),
        ("lsq, all", "of 15, at every moment"),
    ],
)
def test_resumed_equals_uninterrupted(kind, moment, whole, float_model, digits, tmp_path):
    spec = digits_spec(float_model, **KINDS[kind])
    for steps in MOMENTS[moment]:
        interrupted(digits, spec, tmp_path, steps)
    assert load_checkpoint(tmp_path / "checkpoints")["step"] == sum(MOMENTS[moment])
    torch.manual_seed(99)  # a new process has a different generator state
    result = train(digits, spec, tmp_path, CPU)
    assert outcome(result) == outcome(whole[kind][0])
    assert digest((tmp_path / "model.pt").read_bytes()) == whole[kind][0].model_sha256


def test_the_curve_has_every_epoch_once_after_a_resume(whole, float_model, digits, tmp_path):
    curve, spec = [], digits_spec(float_model)
    for steps in (9, 5, 4, None):
        asked = iter(range(1, 100))
        hooks = Hooks(
            on_epoch=curve.append,
            should_stop=lambda asked=asked, steps=steps: next(asked) == steps,
        )
        try:
            train(digits, spec, tmp_path, CPU, hooks)
        except Interrupted:
            continue
    expected = whole["uniform"][1]
    assert [(p.epoch, p.step, p.phase) for p in curve] == [
        (1, 9, "noise"),
        (2, 18, "tuning"),
        (3, 27, "tuning"),
    ]
    assert [p.metrics for p in curve] == [p.metrics for p in expected]


def test_killed_before_the_checkpoint_of_an_epoch(whole, float_model, digits, tmp_path):
    """A killed process saves nothing, so the epoch is trained again."""
    spec = digits_spec(float_model)

    def die(point):
        if point.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(digits, spec, tmp_path, CPU, Hooks(on_epoch=die))
    assert load_checkpoint(tmp_path / "checkpoints")["step"] == 9
    assert outcome(train(digits, spec, tmp_path, CPU)) == outcome(whole["uniform"][0])


@pytest.mark.parametrize("kind", ["uniform", "all"])
def test_killed_after_the_last_step(kind, whole, float_model, digits, tmp_path, monkeypatch):
    spec = digits_spec(float_model, **KINDS[kind])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trial._Training, "_finish", _die)
        train(digits, spec, tmp_path, CPU)
    assert load_checkpoint(tmp_path / "checkpoints")["step"] == whole[kind][0].steps
    assert outcome(train(digits, spec, tmp_path, CPU)) == outcome(whole[kind][0])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_float_training_resumes_too(optimizer, digits, tmp_path):
    config = FloatConfig(
        optimizer=optimizer,
        lr=0.01,
        accumulate=2,
        precision="bfloat16",
        ema=0.9,
        grad_clip=1.0,
        epochs=2,
    )
    spec = TrainSpec(train=config.as_training(), seed=4)
    expected = train(digits, spec, tmp_path / "whole", CPU)
    for steps in (3, 2, 2):
        interrupted(digits, spec, tmp_path / "cut", steps)
    torch.manual_seed(99)
    assert outcome(train(digits, spec, tmp_path / "cut", CPU)) == outcome(expected)


def _die(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["garbage", "torn state", "torn manifest", "no manifest"])
def test_damaged_newest_checkpoint_falls_back_to_the_previous_one(damage, tmp_path, caplog):
    spec = mlp_spec()
    expected = train(Regression(), spec, tmp_path / "whole", CPU)
    folder = tmp_path / "cut"
    interrupted(Regression(), spec, folder, 8)
    newest = max((folder / "checkpoints").iterdir())
    state, manifest = newest / "state.pt", newest / "manifest.json"
    if damage == "garbage":
        state.write_bytes(b"nothing of value")
    elif damage == "torn state":
        state.write_bytes(state.read_bytes()[:-7])
    elif damage == "torn manifest":
        manifest.write_bytes(manifest.read_bytes()[:20])
    else:
        manifest.unlink()
    with caplog.at_level(logging.WARNING, "nipq_search"):
        assert load_checkpoint(folder / "checkpoints")["step"] == 6
        result = train(Regression(), spec, folder, CPU)
    assert str(newest) in caplog.text and "damaged" in caplog.text
    assert outcome(result) == outcome(expected)


def test_kills_during_checkpoint_writes_keep_valid_ones(tmp_path):
    """Several attempts are killed, each beyond the first checkpoint of the next attempt."""

    def cut_off(step):
        (tmp_path / f"{step:09d}").mkdir()
        (tmp_path / f"{step:09d}" / "state.pt").write_bytes(b"half of it")

    for step in (100, 200):
        save_checkpoint(tmp_path, step, {"step": step})
    cut_off(300)
    save_checkpoint(tmp_path, 250, {"step": 250})
    cut_off(260)
    assert load_checkpoint(tmp_path)["step"] == 250
    save_checkpoint(tmp_path, 255, {"step": 255})
    assert load_checkpoint(tmp_path)["step"] == 255
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [250, 255]


def test_a_hung_write_removes_no_checkpoint_of_the_next_process(tmp_path):
    """The write completes after another process has taken over the training run."""

    class Superseded(Exception):
        pass

    def fence():
        raise Superseded

    for step in (100, 200):
        save_checkpoint(tmp_path, step, {"step": step})
    with pytest.raises(Superseded):
        save_checkpoint(tmp_path, 50, {"step": 50}, fence=fence)
    assert load_checkpoint(tmp_path)["step"] == 200


def test_training_after_damage_to_all_checkpoints_keeps_new_ones(tmp_path):
    for step in (100, 200):
        save_checkpoint(tmp_path, step, {"step": step})
        (tmp_path / f"{step:09d}" / "state.pt").write_bytes(b"garbage")
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 50, {"step": 50})
    assert load_checkpoint(tmp_path)["step"] == 50


def test_training_restarts_without_a_valid_checkpoint(tmp_path, caplog):
    spec = mlp_spec()
    expected = train(Regression(), spec, tmp_path / "whole", CPU)
    folder = tmp_path / "cut"
    interrupted(Regression(), spec, folder, 2)
    for manifest in folder.rglob("manifest.json"):
        manifest.write_text("{}")
    result = train(Regression(), spec, folder, CPU)
    assert outcome(result) == outcome(expected)


def test_two_checkpoints_are_kept(tmp_path):
    train(Regression(), mlp_spec(epochs=5), tmp_path, CPU)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "000000024",
        "000000030",
    ]


def test_checkpoints_are_also_written_by_time(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        trial, "save_checkpoint", lambda folder, step, state, home, fence: seen.append(step)
    )
    train(Regression(), mlp_spec(checkpoint_minutes=1e-9), tmp_path, CPU)
    assert seen == list(range(1, 19))


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    spec = mlp_spec()
    interrupted(Regression(), spec, tmp_path, 2)

    def full(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("nipq_search.file_io.write_bytes", full)
        train(Regression(), spec, tmp_path, CPU)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000000002"]
    train(Regression(), spec, tmp_path, CPU)


class Dropped(Regression):
    """A task whose dropout and DataLoader (once per epoch) draw from the global generator."""

    def build_model(self):
        return torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1)
        )

    def loader(self, split, batch_size, seed=None):
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        x = torch.rand(6 * batch_size, 4, generator=generator)
        data = [{"x": row, "y": row.sum(0, keepdim=True)} for row in x]
        return torch.utils.data.DataLoader(data, batch_size=batch_size)


@pytest.mark.parametrize(("steps", "accumulate"), [(4, 1), (7, 1), (14, 1), (1, 4), (5, 4)])
def test_dropout_and_a_dataloader_resume_bit_identically(steps, accumulate, tmp_path):
    spec = mlp_spec(accumulate=accumulate)
    expected = train(Dropped(), spec, tmp_path / "whole", CPU)
    interrupted(Dropped(), spec, tmp_path / "cut", steps)
    torch.manual_seed(99)
    assert outcome(train(Dropped(), spec, tmp_path / "cut", CPU)) == outcome(expected)
