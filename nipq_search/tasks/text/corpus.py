"""Running text as blocks of tokens: the argument section, splits, masking and batches."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nipq_search.tasks.base import SPLITS
from nipq_search.tasks.common.arguments import (
    argument_error,
    check_disjoint,
    check_limit,
    paths,
    positive,
    text_or_integer,
)
from nipq_search.tasks.common.sections import store
from nipq_search.tasks.text.files import find_files, read_text
from nipq_search.tasks.text.splits import TextSplits

IGNORED = -100
"""Target for positions that are not predicted; cross-entropy ignores it."""

Blocks = NDArray[np.int32]
"""Tokens (N, L). A numpy array, because Ray's object store shares arrays between the processes of
a node without copying them. Shared arrays are read-only, so no function writes to them."""

_RUNS = 100
"""Maximum number of runs of consecutive blocks that are assigned to splits."""

_CHARACTERS_AT_ONCE = 1_000_000
"""Minimum number of characters that are tokenized in one call, except at the end of a text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text files and the length of the blocks into which they are cut.

    Attributes:
        path: text files, folders of text files, patterns with `*`, or `package://PACKAGE/FILE`.
            Files of the validation and test splits are left out.
        encoding: encoding of the files.
        block: number of tokens per sample.
    """

    path: str | Sequence[str]
    encoding: str = "utf-8"
    block: int = 128

    def __post_init__(self) -> None:
        """Check every argument and make paths absolute."""
        store(
            self,
            path=paths("path", self.path),
            encoding=text_or_integer("encoding", self.encoding),
        )
        positive("block", self.block)

    def files(self, splits: TextSplits) -> dict[str, list[Path]]:
        """Return the files by argument: `path` for training, and those of any separate splits.

        Raises:
            UserError: a path matches no file, no file is left to train on, or splits share a file.
        """
        files = {"path": find_files(self.path, "task_args.path")}
        for key, given in splits.files().items():
            files[key] = find_files(given, f"task_args.{key}")
            # A folder can contain the files of all splits.
            files["path"] = [file for file in files["path"] if file not in files[key]]
        if not files["path"]:
            raise argument_error(
                "path", "no file is left to train on: validation and test include all of them"
            )
        check_disjoint("test", files.get("test", ()), files.get("validation", ()))
        return files


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Tokens before a text, after it, and between two documents; each can be empty."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    between: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialTokens:
        """Return the tokens that a tokenizer adds to a text, and its end-of-text or separator."""
        around = tuple(tokenizer("")["input_ids"])
        ids = (tokenizer.eos_token_id, tokenizer.sep_token_id)
        between = next(((token,) for token in ids if token is not None), ())
        return cls(before=around[:1], after=around[1:], between=between)


def read_blocks(tokenizer: Any, files: Sequence[Path], encoding: str, length: int) -> Blocks:
    """Cut the concatenated text of files into blocks; an incomplete last block is dropped.

    Args:
        tokenizer: a transformers tokenizer.
        files: text files, one document each.
        encoding: encoding of the files.
        length: number of tokens per block, including the special tokens around the text.

    Returns:
        The blocks in order.

    Raises:
        UserError: a file cannot be read or has a different encoding, or blocks are too short.
    """
    special = SpecialTokens.of(tokenizer)
    body = length - len(special.before) - len(special.after)
    if body < 2:
        raise argument_error(
            "block", f"{length} leaves {max(body, 0)} tokens of text; increase it"
        )
    pieces: list[NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
    for file in files:
        for chunk in _chunks(read_text(file, encoding)):
            ids = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
            pieces.append(np.array(ids, dtype=np.int32))
        pieces.append(np.array(special.between, dtype=np.int32))
    tokens = np.concatenate(pieces)
    count = len(tokens) // body
    blocks = np.empty((count, length), dtype=np.int32)
    start = len(special.before)
    blocks[:, :start] = special.before
    blocks[:, start : start + body] = tokens[: count * body].reshape(count, body)
    blocks[:, start + body :] = special.after
    return blocks


def _chunks(text: str) -> Iterator[str]:
    """Yield a long text in chunks of whole lines, so that tokenization needs less memory."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _CHARACTERS_AT_ONCE) + 1 or len(text)
        yield text[start:end]
        start = end


def split_blocks(
    blocks: Blocks, splits: TextSplits, own: Mapping[str, Blocks]
) -> dict[str, Blocks]:
    """Divide blocks into splits by drawing runs of consecutive blocks from the whole text.

    Args:
        blocks: blocks (N, L) of the main text, in order. They are divided into at most 100 runs,
            and each held-out share consists of at least one run.
        splits: how to divide the blocks.
        own: blocks by split, for the splits that have separate files.

    Returns:
        The blocks of the train, validation and test splits, in this order.

    Raises:
        UserError: a split is empty, or there are fewer training blocks than
            `splits.train_samples`.
    """
    # Unlike default_rng, RandomState produces the same stream in every version of numpy.
    generator = np.random.RandomState(splits.split_seed)
    runs = np.array_split(np.arange(len(blocks)), max(1, min(_RUNS, len(blocks))))
    order = generator.permutation(len(runs))
    found = dict(own)
    for name, share in splits.shares().items():
        count = max(1, round(share * len(runs)))
        found[name] = blocks[_gather(runs, order[:count])]
        order = order[count:]
    train = _gather(runs, order)
    if splits.train_samples is not None:
        check_limit("train_samples", splits.train_samples, len(train))
        train = np.sort(generator.permutation(train)[: splits.train_samples])
    found["train"] = blocks[train]
    for name in SPLITS:
        if not len(found[name]):
            key = name if name in own else "path"
            raise argument_error(
                key,
                f"too little text: {len(blocks)} blocks, none for {name}; reduce block",
            )
    return {name: found[name] for name in SPLITS}


def _gather(runs: Sequence[NDArray[np.int64]], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the indices of the blocks in the chosen runs, in ascending order."""
    found = [runs[index] for index in np.sort(chosen)]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """Selection and masking of the tokens to predict; their number is the same in every block.

    Of the selected tokens, 80% are replaced with the mask token, 10% are replaced with a random
    token, and 10% are left unchanged (Devlin et al., 2019).

    Attributes:
        share: share of the text's tokens to predict.
        token: id of the mask token.
        vocabulary: number of tokens in the vocabulary, from which random tokens are drawn.
        first: number of special tokens before the text of a block.
        last: number of special tokens after the text of a block.
    """

    share: float
    token: int
    vocabulary: int
    first: int
    last: int

    def __call__(self, blocks: NDArray[np.int64], generator: np.random.RandomState) -> Any:
        """Return the inputs and targets, both (B, L).

        The random draws for a block do not depend on the batch size.
        """
        length = blocks.shape[1]
        body = length - self.first - self.last
        draws = generator.random_sample((*blocks.shape, 3))
        where = draws[:, self.first : length - self.last, 0]
        chosen = np.argsort(where, axis=1)[:, : max(1, round(self.share * body))] + self.first
        targets = np.full_like(blocks, IGNORED)
        rows = np.arange(len(blocks))[:, None]
        targets[rows, chosen] = blocks[rows, chosen]
        action = draws[rows, chosen, 1]
        random = (draws[rows, chosen, 2] * self.vocabulary).astype(np.int64)
        inputs = blocks.copy()
        inputs[rows, chosen] = np.where(
            action < 0.8, self.token, np.where(action < 0.9, random, blocks[rows, chosen])
        )
        return inputs, targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockBatches:
    """One epoch of blocks, including the last partial batch; each pass yields equal batches.

    Attributes:
        blocks: the tokens.
        batch_size: blocks per batch.
        masking: how tokens are masked; None selects next-token prediction.
        seed: seed for the order and the masks; None keeps the order and uses fixed masks.
    """

    blocks: Blocks
    batch_size: int
    masking: Masking | None
    seed: int | None = None

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.blocks) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets (B, L), int64; targets that do not count are `IGNORED`."""
        order = np.arange(len(self.blocks))
        if self.seed is not None:
            shuffle = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(order), generator=shuffle).numpy()
        generator = np.random.RandomState(self.seed or 0)
        for start in range(0, len(order), self.batch_size):
            inputs = self.blocks[order[start : start + self.batch_size]].astype(np.int64)
            if self.masking is not None:
                inputs, targets = self.masking(inputs, generator)
            else:
                targets = np.full_like(inputs, IGNORED)
                targets[:, :-1] = inputs[:, 1:]
            yield torch.from_numpy(inputs), torch.from_numpy(targets)


def digest_blocks(splits: Mapping[str, Blocks]) -> str:
    """Return the SHA-256 of the names, shapes and contents of the splits, in hexadecimal."""
    total = hashlib.sha256()
    for name, blocks in splits.items():
        total.update(f"{name}{blocks.shape}".encode())
        total.update(np.ascontiguousarray(blocks).data)
    return total.hexdigest()
