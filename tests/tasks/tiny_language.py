"""A tokenizer with a few words, a small checkpoint, and texts made of these words."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

GOOD = "fine great lovely warm bright funny brave tender".split()
BAD = "dull weak boring cold empty loud flat tired".split()
OTHER = "the a film plot actor scene is was very not with and music story end of in".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
"""Sizes of a BERT whose forward pass takes milliseconds."""


def write_tokenizer(folder: Path) -> Path:
    """Save a tokenizer of whole words with the special tokens of BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *GOOD, *BAD, *OTHER, ".", ","]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    roles = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TINY["max_position_embeddings"],
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{role}_token": word for role, word in roles.items()},
    ).save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path, factory: str = "AutoModel", kind: str = "bert") -> Path:
    """Save a tokenizer, and a model of `TINY` size with random weights."""
    import transformers

    write_tokenizer(folder)
    vocabulary = len(SPECIAL) + len(GOOD) + len(BAD) + len(OTHER) + 2
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocabulary, **TINY)
    getattr(transformers, factory).from_config(config).save_pretrained(folder)
    return folder


def sentence(rng: random.Random, words: list[str]) -> str:
    """Return a few words, including one or two of the given ones."""
    chosen = rng.choices(OTHER, k=rng.randint(4, 12)) + rng.choices(words, k=rng.randint(1, 2))
    rng.shuffle(chosen)
    return " ".join(chosen)


def reviews(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return rows with good and bad reviews of 20 films."""
    rng = random.Random(seed)
    return [
        {
            "review": sentence(rng, GOOD if number % 2 else BAD),
            "verdict": "good" if number % 2 else "bad",
            "film": f"film {number // 2 % 20}",
        }
        for number in range(count)
    ]


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def prose(words: int, seed: int = 0) -> str:
    """Return running text of about this many words."""
    rng = random.Random(seed)
    lines = (sentence(rng, rng.choice([GOOD, BAD])) + " ." for _ in range(words // 10))
    return "\n".join(lines) + "\n"
