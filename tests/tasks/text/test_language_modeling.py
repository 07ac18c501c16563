"""Language modeling, beyond the conformance tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sample_arguments import sample_arguments
from tiny_language import SPECIAL, TINY, prose, write_checkpoint, write_tokenizer

from nipq_search.errors import UserError
from nipq_search.quant import QuantConfig, prepare
from nipq_search.tasks import make_task
from nipq_search.tasks.text.corpus import IGNORED, Masking, split_blocks
from nipq_search.tasks.text.language_models import ModelSource, load_tokenizer
from nipq_search.tasks.text.splits import TextSplits

CLS, SEP, MASK = (SPECIAL.index(word) for word in ("[CLS]", "[SEP]", "[MASK]"))
NAMES = ("masked_lm", "causal_lm")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return {name: sample_arguments(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture
def make(arguments):
    return lambda name, **changes: make_task(name, {**arguments[name], **changes})


def test_blocks_hold_the_text_in_order(make, arguments, tmp_path):
    (tmp_path / "a.txt").write_text(prose(900, 5))
    (tmp_path / "b.txt").write_text(prose(900, 6))
    (tmp_path / "c.txt").write_text(prose(900, 7))
    own = {"validation": str(tmp_path / "b.txt"), "test": [str(tmp_path / "a.txt")]}
    task = make("causal_lm", path=str(tmp_path), **own)
    tokenizer = load_tokenizer(ModelSource(model=arguments["causal_lm"]["model"]))
    blocks = task.split("validation")
    assert (blocks[:, 0] == CLS).all() and (blocks[:, -1] == SEP).all()
    wanted = tokenizer(prose(900, 6), add_special_tokens=False)["input_ids"]
    text = blocks[:, 1:-1].reshape(-1)
    assert text.tolist() == [*wanted, SEP][: len(text)]
    assert len(wanted) - len(text) < 14
    texts = [{block.tobytes() for block in task.split(name)} for name in ("train", "test")]
    assert all(texts) and not texts[0] & texts[1]
    with pytest.raises(UserError, match="no file is left to train on"):
        make("causal_lm", path=own["test"], **own).load_data()


def test_a_long_file_is_cut_at_lines(make, monkeypatch, arguments):
    whole = make("causal_lm").dataset()["digest"]
    monkeypatch.setattr("nipq_search.tasks.text.corpus._CHARACTERS_AT_ONCE", 100)
    assert make("causal_lm").dataset()["digest"] == whole


def test_shares_are_contiguous_runs():
    blocks = np.arange(1000, dtype=np.int32)[:, None]
    found = split_blocks(blocks, TextSplits(validation=0.1, test=0.2), {})
    assert [len(part) for part in found.values()] == [700, 100, 200]
    for part in found.values():
        assert np.array_equal(part, np.sort(part, axis=0))
        assert (np.diff(part[:, 0]) == 1).mean() >= 0.9
    assert sorted(np.concatenate(list(found.values()))[:, 0]) == list(range(1000))
    limited = TextSplits(validation=0.1, test=0.2, train_samples=50)
    fewer = split_blocks(blocks, limited, {})
    assert len(fewer["train"]) == 50
    assert np.array_equal(fewer["test"], found["test"])


def test_masks_are_of_the_text_alone_and_as_many_in_every_block(make):
    task = make("masked_lm")
    inputs, targets = (
        torch.cat(parts) for parts in zip(*task.loader("train", 32, 1), strict=True)
    )
    chosen = targets != IGNORED
    assert (chosen.sum(dim=1) == 2).all()
    assert not chosen[:, 0].any() and not chosen[:, -1].any()
    original = torch.where(chosen, targets, inputs)
    wanted = task.split("train")
    assert sorted(original.tolist()) == sorted(wanted.tolist())


def test_four_fifths_become_the_mask_token():
    masking = Masking(share=0.15, token=3, vocabulary=1000, first=1, last=1)
    blocks = np.full((2000, 22), 500, dtype=np.int64)
    inputs, targets = masking(blocks, np.random.RandomState(0))
    now = inputs[targets != IGNORED]
    assert len(now) == 3 * 2000
    assert (now == 3).mean() == pytest.approx(0.8, abs=0.02)
    assert (now == 500).mean() == pytest.approx(0.1, abs=0.02)
    assert (inputs[targets == IGNORED] == 500).all()


def test_masks_of_validation_do_not_depend_on_the_batch(make):
    task = make("masked_lm")
    parts = [list(task.loader("validation", size)) for size in (3, 16)]
    one, other = ([torch.cat(t) for t in zip(*part, strict=True)] for part in parts)
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_that_of_transformers(make, name):
    task = make(name)
    model, batch = task.build_model().eval(), next(iter(task.loader("validation", 8)))
    labels = batch[0] if name == "causal_lm" else batch[1]
    wanted = model.model(input_ids=batch[0], labels=labels).loss
    torch.testing.assert_close(task.loss(model, batch), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_over_all_predicted_tokens(make, name):
    task = make(name, hidden_weight=0.0)
    model = task.build_model().eval()
    figures = task.evaluate(model, "test")
    whole = next(iter(task.loader("test", 10_000)))
    assert figures["loss"] == pytest.approx(task.loss(model, whole).item(), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert set(figures) == {"perplexity", "loss", "accuracy"}
    torch.nn.init.constant_(model.model.get_output_embeddings().weight, 1e6)
    assert math.isfinite(task.evaluate(model, "test")["perplexity"])


def test_hidden_states_are_matched(make):
    task, plain = make("causal_lm"), make("causal_lm", hidden_weight=0.0)
    model, other = task.build_model().eval(), task.build_model().eval()
    batch = next(iter(task.loader("train", 8, 0)))
    same = task.distill_loss(model, model, batch)
    torch.testing.assert_close(same, plain.distill_loss(model, model, batch))
    assert task.distill_loss(model, other, batch) > plain.distill_loss(model, other, batch) + 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_prepared_model_learns(make, name):
    task = make(name, hidden_weight=0.0)
    torch.manual_seed(0)
    # A warning, which fails the test, would report multiplications that stay in float.
    model = prepare(task.build_model(), task.example_inputs(), QuantConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = task.evaluate(model, "validation")
    for epoch in range(3):
        for batch in task.loader("train", 16, epoch):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
    assert task.evaluate(model, "validation")["perplexity"] < 0.8 * before["perplexity"]


def test_text_is_found_in_folders_and_patterns(make, tmp_path):
    for place in ("a.txt", "sub/b.txt", ".hidden/c.txt", "sub/d.md"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(prose(300))
    sizes = [
        sum(make("causal_lm", path=f"{tmp_path}{end}").dataset()["splits"].values())
        for end in ("/a.txt", "/**/*.txt", "")
    ]
    assert sizes[1] == pytest.approx(2 * sizes[0], abs=1)
    assert sizes[2] == pytest.approx(3 * sizes[0], abs=2)


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("causal_lm", {"path": "none/*.txt"}, r"task_args.path: no files found at .*/none/\*.txt"),
        ("causal_lm", {"path": []}, "task_args.path: .* neither a path nor a list"),
        ("causal_lm", {"validation": "no.txt"}, "task_args.validation: no file .*/no.txt"),
        ("causal_lm", {"block": 3}, "task_args.block: 3 leaves 1 tokens of text"),
        ("causal_lm", {"block": 65}, "task_args.block: the model accepts at most 64 tokens"),
        ("causal_lm", {"encoding": "ascii-9"}, "'ascii-9' is not a known encoding"),
        (
            "causal_lm",
            {"config": {"model_type": "bert", **TINY}},
            "its predictions depend on later",
        ),
        (
            "causal_lm",
            {"config": {"model_type": "distilbert"}},
            "AutoModelForCausalLM does not support distilbert models",
        ),
        (
            "masked_lm",
            {"mask_share": 2},
            "task_args.mask_share: 2 is not a number from 0.001 to 1",
        ),
        ("masked_lm", {"mask_share": 0}, "task_args.mask_share: 0 is not a number from 0.001"),
        ("causal_lm", {"train_samples": 9999}, "task_args.train_samples: 9999 exceeds the"),
        ("masked_lm", {"mask_shre": 1}, "no such argument .did you mean 'mask_share'"),
        (
            "masked_lm",
            {"config": {"model_type": "gpt2"}},
            "AutoModelForMaskedLM does not support gpt2 models",
        ),
    ],
)
def test_errors_are_reported_in_one_line(make, name, changes, problem):
    with pytest.raises(UserError, match=problem) as error:
        make(name, **changes).build_model()
    assert "\n" not in str(error.value)


def test_an_encoder_can_be_configured_as_a_decoder(make):
    config = {"model_type": "bert", **TINY, "is_decoder": True}
    make("causal_lm", config=config).build_model()


def test_too_little_text_and_wrong_bytes_are_named(make, tmp_path):
    (tmp_path / "short.txt").write_text("a film .")
    with pytest.raises(UserError, match="too little text: 0 blocks"):
        make("causal_lm", path=str(tmp_path / "short.txt")).load_data()
    (tmp_path / "latin.txt").write_bytes("a film, né .".encode("latin-1"))
    with pytest.raises(
        UserError, match=r"latin.txt: byte 9 is not valid utf-8; .*encoding: latin-1"
    ):
        make("causal_lm", path=str(tmp_path / "latin.txt")).load_data()


def test_a_file_belongs_to_one_split(make, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(prose(300))
    last = str(tmp_path / "c.txt")
    with pytest.raises(
        UserError, match="task_args.test: .*c.txt is already in the validation split"
    ):
        make("causal_lm", path=str(tmp_path), validation=last, test=last)
    with pytest.raises(
        UserError, match="task_args.test: .*c.txt is already in the validation split"
    ):
        make("causal_lm", path=str(tmp_path), validation=last, test=f"{last}*").load_data()
    with pytest.raises(UserError, match="task_args.path: no file is left to train on"):
        make("causal_lm", path=last, validation=last).load_data()


def test_an_encoder_is_not_a_masked_language_model(make, tmp_path):
    """transformers would initialize its output layer at random."""
    write_checkpoint(tmp_path)
    task = make("masked_lm", model=str(tmp_path), train_from_scratch=False, config=None)
    with pytest.raises(UserError, match="lacks . weights of BertForMaskedLM: cls.predictions"):
        task.build_model()


def test_a_model_without_mask_token_is_refused(make, tmp_path):
    tokenizer = load_tokenizer(ModelSource(model=str(write_tokenizer(tmp_path / "old"))))
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no mask token"):
        make("masked_lm", model=str(tmp_path)).load_data()
