"""Text classification, beyond the conformance tests."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import pytest
import torch
import yaml
from sample_arguments import sample_arguments
from tiny_language import TINY, reviews, write_checkpoint, write_table, write_tokenizer

from nipq_search.cli import main
from nipq_search.errors import UserError
from nipq_search.quant import QuantConfig, prepare
from nipq_search.tasks import make_task
from nipq_search.train.forward import SharedForward

NAME = "text_classification"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return sample_arguments(NAME, tmp_path_factory.mktemp("reviews"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def make(arguments, **changes):
    return make_task(NAME, {**arguments, **changes})


def test_padding_changes_no_output(arguments):
    task = make(arguments)
    model = task.build_model().eval()
    ids, mask, labels = next(iter(task.loader("validation", 16)))
    assert ids.shape == mask.shape and len(labels) == 16
    assert mask.sum(dim=1).max() == ids.shape[1] > mask.sum(dim=1).min()
    together = model(ids, mask)
    for row, kept, wanted in zip(ids, mask.bool(), together, strict=True):
        alone = model(row[kept][None], torch.ones(1, int(kept.sum()), dtype=torch.int64))
        torch.testing.assert_close(alone[0], wanted)


@pytest.mark.parametrize("similar", [False, True])
def test_an_epoch_has_every_text_once(arguments, similar):
    task = make(arguments, similar_lengths=similar, group=None)
    batches = list(task.loader("train", 16, 3))
    assert len(batches) == len(task.loader("train", 16, 3))
    assert [len(b[-1]) for b in batches[:-1]] == [16] * (len(batches) - 1)
    seen = sorted(
        row[kept.bool()].numpy().tobytes()
        for ids, mask, _ in batches
        for row, kept in zip(ids, mask, strict=True)
    )
    kept = task.split("train")
    every = (np.split(kept.ids.astype(np.int64), kept.offsets[1:-1])[i] for i in range(len(kept)))
    assert seen == sorted(text.tobytes() for text in every)


def test_similar_lengths_need_less_padding(arguments):
    sizes = [
        sum(batch[0].numel() for batch in make(arguments, similar_lengths=s).loader("train", 8, 1))
        for s in (False, True)
    ]
    assert sizes[1] < 0.95 * sizes[0]


def test_pairs_have_token_types(tmp_path, arguments):
    rows = [{**row, "film": row["review"][::-1]} for row in reviews(100)]
    path = write_table(tmp_path / "pairs.csv", rows)
    task = make(arguments, path=str(path), text_pair="film", group=None)
    ids, mask, types, labels = next(iter(task.loader("train", 8, 0)))
    assert types.max() == 1 and types.shape == ids.shape
    assert torch.isfinite(task.build_model()(*task.example_inputs())).all()
    assert len(task.example_inputs()) == 3


def test_the_example_has_the_length_that_costs_count(arguments):
    assert make(arguments).example_inputs()[0].shape == (1, 24)
    assert make(arguments, example_length=10).example_inputs()[0].shape == (1, 10)


def test_train_samples_is_a_cap(arguments):
    assert len(make(arguments, train_samples=20).split("train")) == 20
    with pytest.raises(UserError, match="train_samples: 10000 exceeds the 144 available"):
        make(arguments, train_samples=10_000).load_data()


def test_weights_of_a_checkpoint_are_loaded(arguments, checkpoint):
    import transformers

    task = make(arguments, model=str(checkpoint), train_from_scratch=False, config=None)
    model, other = task.build_model(), task.build_model()
    wanted = transformers.AutoModel.from_pretrained(checkpoint).state_dict()
    found = model.encoder.state_dict()
    assert {key for key in wanted if "pooler" not in key} == set(found)
    assert all(torch.equal(wanted[key], value) for key, value in found.items())
    assert not torch.equal(model.head.weight, other.head.weight)
    layers = make(
        arguments, model=str(checkpoint), train_from_scratch=False, config={"num_hidden_layers": 1}
    )
    assert len(layers.build_model().encoder.encoder.layer) == 1


def test_dropout_is_off_unless_asked_for(arguments):
    def rates(**changes):
        config = make(arguments, **changes).build_model().encoder.config
        return config.hidden_dropout_prob, config.attention_probs_dropout_prob

    assert rates() == (0.0, 0.0)
    assert rates(dropout=0.3) == (0.3, 0.3)
    assert rates(dropout=None) == (0.1, 0.1)


def test_hidden_states_are_matched_where_tokens_are(arguments):
    task = make(arguments, hidden_weight=1.0)
    model, batch = task.build_model().eval(), next(iter(task.loader("train", 8, 0)))
    plain = make(arguments, hidden_weight=0.0)
    same = task.distill_loss(model, model, batch)
    torch.testing.assert_close(same, plain.distill_loss(model, model, batch))
    other = task.build_model().eval()
    assert task.distill_loss(model, other, batch) > plain.distill_loss(model, other, batch) + 0.1


def test_a_prepared_model_learns(arguments):
    """Training reduces the loss of quantized layers inside modules of transformers."""
    task = make(arguments)
    torch.manual_seed(0)
    teacher = task.build_model().eval()
    # A warning, which fails the test, would report multiplications that stay in float.
    model = prepare(teacher, task.example_inputs(), QuantConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for epoch in range(12):
        for batch in task.loader("train", 32, epoch):
            shared = SharedForward(model)
            loss = task.loss(shared, batch) + 0 * task.distill_loss(shared, teacher, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    figures = task.evaluate(model, "test")
    assert set(figures) == {"accuracy", "f1", "matthews", "loss"}
    assert figures["accuracy"] > 0.7 and figures["matthews"] > 0.4


def test_figures_are_those_of_the_definitions(arguments):
    from sklearn import metrics as sklearn

    task = make(arguments, metric="matthews")
    assert task.metric == ("matthews", "max")
    model = task.build_model().eval()
    batches = list(task.loader("test", 7))
    found = torch.cat([model(*b[:-1]).argmax(1) for b in batches]).numpy()
    labels = torch.cat([b[-1] for b in batches]).numpy()
    figures = task.evaluate(model, "test")
    assert figures["accuracy"] == pytest.approx((found == labels).mean())
    assert figures["f1"] == pytest.approx(sklearn.f1_score(labels, found, average="macro"))
    assert figures["matthews"] == pytest.approx(sklearn.matthews_corrcoef(labels, found), abs=1e-6)


def test_the_task_ships_arrays_and_no_tokenizer(arguments):
    task = make(arguments)
    task.load_data()
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(task, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 5000 and b"tokenizers" not in data
    assert len(buffers) == 3 * 3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"path": "no/such.csv"},
            "task_args.path: no file .*/no/such.csv; the folder .*/no does not exist",
        ),
        ({"text": "revew"}, r"task_args.text: .* no column 'revew' \(did you mean 'review'\?\)"),
        ({"group": "movie"}, "task_args.group: .* has no column 'movie'"),
        ({"metric": "f2"}, r"task_args.metric: 'f2' is unknown \(did you mean 'f1'\?\)"),
        (
            {"validation": 1.5},
            "validation: 1.5 is neither a share between 0 and 1 nor a path",
        ),
        ({"validation": 0.6, "test": 0.4}, "leaves no training data"),
        ({"max_length": 0}, "task_args.max_length: 0 is not an integer from 8"),
        ({"max_length": 65}, "task_args.max_length: the model accepts at most 64 tokens"),
        ({"max_length": 4}, "task_args.max_length: 4 is not an integer from 8"),
        ({"example_length": 99}, "task_args.example_length: 99 is not an integer from 1 to 24"),
        ({"example_length": 0}, "task_args.example_length: 0 is not an integer from 1 to 24"),
        (
            {"validation": "a.csv", "test": ["b.csv", "./a.csv"]},
            "test: .*a.csv is already in the valid",
        ),
        ({"labels": "good"}, "task_args.labels: 'good' is not a list"),
        ({"labels": ["bad", "bad"]}, "task_args.labels: .* not a list of distinct names"),
        ({"columns": [1.5]}, "task_args.columns: 1.5 is not a non-empty string"),
        ({"group": ["film"]}, "task_args.group: .'film'. is not a non-empty string"),
        ({"split_seed": -1}, "task_args.split_seed: -1 is not an integer from 0 to"),
        ({"deduplicate": "no"}, "task_args.deduplicate: 'no' is neither true nor false"),
        ({"labels": ["good", "bad", "okay"]}, "task_args.labels: no row has the label 'okay'"),
        ({"hidden_weight": -1}, "task_args.hidden_weight: -1 is not a number >= 0"),
        ({"dropout": 2}, "task_args.dropout: 2 is not a number from 0 to 1"),
        ({"config": [1]}, "task_args.config: .* is not a mapping"),
        ({"train_from_scratch": False}, "task_args.config: with model_type it describes a new"),
        ({"config": {"model_type": "brt"}}, "the configuration cannot be loaded: Unrecognized"),
        ({"config": {"model_type": "t5"}}, "t5 is an encoder-decoder"),
        ({"config": {"model_type": "bert", "hidden": 3}}, "task_args.config.hidden: bert models"),
        ({"config": {"model_type": "bert", **TINY, "vocab_size": 9}}, "9 embeddings, but the tok"),
        ({"config": None}, "task_args.model: no config.json in"),
        ({"config": {"model_type": "bert", **TINY, "hidden_size": 15}}, "the model cannot be"),
        ({"model": "./nowhere"}, "task_args.model: no folder .*/nowhere"),
        ({"model": "package://no_such_model/x"}, "pip install no-such-model"),
        ({"model": "no-org/no-model"}, "is not a local folder, and its tokenizer could"),
    ],
)
def test_errors_are_reported_in_one_line(arguments, changes, problem, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=problem) as error:
        make(arguments, **changes).build_model()
    assert "\n" not in str(error.value)


def test_bad_checkpoints_are_named(arguments, checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    def problem(folder):
        with pytest.raises(UserError) as error:
            make(arguments, model=str(folder), train_from_scratch=False, config=None).build_model()
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no tokenizer in" in problem(tmp_path)
    write_tokenizer(tmp_path)
    assert "no config.json in" in problem(tmp_path)
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert "no weights in" in problem(tmp_path)
    weights = load_file(checkpoint / "model.safetensors")
    lost = [key for key in weights if "layer.1.intermediate" in key or "pooler" in key]
    kept = {key: value for key, value in weights.items() if key not in lost}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    message = problem(tmp_path)
    assert "the checkpoint lacks 2 weights of BertModel: encoder.layer.1.intermediate" in message
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert "the model cannot be loaded" in problem(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "the tokenizer cannot be loaded" in problem(tmp_path)


def test_weights_of_other_shapes_or_of_no_value_are_named(arguments, checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    args = {"model": str(tmp_path), "train_from_scratch": False, "config": None}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 30}))
    shapes = r"layer.0.intermediate.dense.bias has shape \(24,\) in the checkpoint and \(30,\)"
    with pytest.raises(UserError, match=shapes):
        make(arguments, **args).build_model()
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][3] = float("inf")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="weights are not finite: encoder.layer.1.output.dense.b"):
        make(arguments, **args).build_model()


def test_bad_input_exits_2_with_one_line(arguments, tmp_path, capsys):
    given = {"task": NAME, "task_args": {**arguments, "label": "verdikt"}, "name": "x"}
    document = {**given, "budgets": [{"bops": "uniform 4"}]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(document))))
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(main(["plan", str(tmp_path / "sweep.yaml")]))
    assert stopped.value.code == 2
    assert "no column 'verdikt' (did you mean 'verdict'?)" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["transformers", "torchmetrics", "pyarrow"])
def test_a_missing_library_is_named(arguments, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}: pip install 'nipq-search\[text\]'"):
        make(arguments).load_data()
