"""Arguments for the conformance tests of tasks, with generated data where needed.

Each task that needs arguments has a function that writes its files into a folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_images import image_tree
from tiny_language import TINY, prose, reviews, write_table, write_tokenizer


def image_folder(folder: Path) -> dict[str, Any]:
    """Return arguments for class folders without splits and a small model of timm."""
    tree = folder / "images"
    if not tree.exists():
        image_tree(tree, {".": 20})
    return {"path": str(tree), "model": "test_efficientnet", "size": 32, "augment": "imagenet"}


def text_classification(folder: Path) -> dict[str, Any]:
    """Return arguments for good and bad reviews, split by film, and a BERT with two layers."""
    return {
        "model": str(write_tokenizer(folder)),
        "path": str(write_table(folder / "reviews.csv", reviews(240))),
        "text": "review",
        "label": "verdict",
        "group": "film",
        "validation": 0.2,
        "test": 0.2,
        "max_length": 24,
        "train_from_scratch": True,
        "config": {"model_type": "bert", **TINY},
        "hidden_weight": 1.0,
    }


def masked_lm(folder: Path) -> dict[str, Any]:
    """Return arguments for running text in two files and a BERT with two layers."""
    for number in range(2):
        (folder / f"part{number}.txt").write_text(prose(1500, number))
    return {
        "model": str(write_tokenizer(folder / "tokenizer")),
        "path": str(folder / "*.txt"),
        "block": 16,
        "train_from_scratch": True,
        "config": {"model_type": "bert", **TINY},
        "hidden_weight": 1.0,
    }


def causal_lm(folder: Path) -> dict[str, Any]:
    """Return arguments for the same text and a GPT-2 with two layers."""
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}
    return {**masked_lm(folder), "config": {**config, "n_positions": 64}}


ARGUMENTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "causal_lm": causal_lm,
    "masked_lm": masked_lm,
    "image_folder": image_folder,
    "text_classification": text_classification,
}
"""Functions by name in the registry; a task without an entry is built without arguments."""


def sample_arguments(name: str, folder: Path) -> dict[str, Any]:
    """Return `task_args` of a small instance of a task; equal folders give equal arguments."""
    return ARGUMENTS[name](folder) if name in ARGUMENTS else {}
