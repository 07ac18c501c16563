"""Running text as blocks of tokens: files, splits, masks, batches."""

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
    check_most,
    distinct,
    paths,
    positive,
    refuse,
    word,
)
from nipq_search.tasks.common.sections import store
from nipq_search.tasks.text.files import find_files, read_text
from nipq_search.tasks.text.splits import TextSplits

IGNORED = -100
"""Target of a position that is not predicted; cross-entropy skips it."""

Blocks = NDArray[np.int32]
"""Tokens (N, L). A numpy array, because Ray's object store hands those to every process of a node
without a copy; read-only then, so nothing here writes to it."""

_RUNS = 100
_CHARACTERS_AT_ONCE = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text files and the length of the blocks into which they are cut.

    Attributes:
        path: text files, folders of them, patterns with `*`, or `package://PACKAGE/FILE`. Files of
            the validation and test splits are left out.
        encoding: encoding of the files.
        block: tokens of a sample.
    """

    path: str | Sequence[str]
    encoding: str = "utf-8"
    block: int = 128

    def __post_init__(self) -> None:
        """Check every argument and make paths absolute."""
        store(self, path=paths("path", self.path), encoding=word("encoding", self.encoding))
        positive("block", self.block)

    def files(self, splits: TextSplits) -> dict[str, list[Path]]:
        """Return the training files as `path`, and those of splits with files of their own.

        Raises:
            UserError: a path matches no file, no file is left to train, or splits share a file.
        """
        files = {"path": find_files(self.path, "task_args.path")}
        for key, given in splits.files().items():
            files[key] = find_files(given, f"task_args.{key}")
            # A folder can contain the files of all splits.
            files["path"] = [file for file in files["path"] if file not in files[key]]
        if not files["path"]:
            raise refuse("path", "no file is left to train: validation and test name them all")
        distinct("test", files.get("test", ()), files.get("validation", ()))
        return files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """What a tokenizer puts around a text, and between two documents; each may be empty."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    between: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        """As the tokenizer treats an empty text."""
        around = tuple(tokenizer("")["input_ids"])
        ids = (tokenizer.eos_token_id, tokenizer.sep_token_id)
        between = next(((token,) for token in ids if token is not None), ())
        return cls(before=around[:1], after=around[1:], between=between)


def read_blocks(tokenizer: Any, files: Sequence[Path], encoding: str, length: int) -> Blocks:
    """Text of all files, one document each, cut into whole blocks; a rest is left out.

    Args:
        tokenizer: of transformers.
        files: text files.
        encoding: of the files.
        length: tokens of a block, those around the text included.

    Raises:
        UserError: a file cannot be read or is not of this encoding, or blocks are too short.
    """
    frame = Frame.of(tokenizer)
    body = length - len(frame.before) - len(frame.after)
    if body < 2:
        raise refuse("block", f"{length} leaves {max(body, 0)} tokens of text; take more")
    parts: list[NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
    for file in files:
        for piece in _pieces(read_text(file, encoding)):
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            parts.append(np.array(ids, dtype=np.int32))
        parts.append(np.array(frame.between, dtype=np.int32))
    tokens = np.concatenate(parts)
    count = len(tokens) // body
    blocks = np.empty((count, length), dtype=np.int32)
    start = len(frame.before)
    blocks[:, :start] = frame.before
    blocks[:, start : start + body] = tokens[: count * body].reshape(count, body)
    blocks[:, start + body :] = frame.after
    return blocks


def _pieces(text: str) -> Iterator[str]:
    """A long text in parts that end with a line: tokenizing all at once takes much memory."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _CHARACTERS_AT_ONCE) + 1 or len(text)
        yield text[start:end]
        start = end


def split_blocks(
    blocks: Blocks, splits: TextSplits, own: Mapping[str, Blocks]
) -> dict[str, Blocks]:
    """Divide blocks into splits; held-out shares consist of whole runs from all over the text.

    Args:
        blocks: blocks (N, L) of the main text, in order. They form at most 100 runs, and a share
            has at least one run.
        splits: how to divide them.
        own: blocks of the splits that have files of their own.

    Returns:
        Blocks of the train, validation and test splits, in this order.

    Raises:
        UserError: a split is empty.
    """
    # Unlike default_rng, RandomState has the same stream in every version of numpy.
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
        check_most("train_samples", splits.train_samples, len(train))
        train = np.sort(generator.permutation(train)[: splits.train_samples])
    found["train"] = blocks[train]
    for name in SPLITS:
        if not len(found[name]):
            key = name if name in own else "path"
            raise refuse(
                key,
                f"too little text: {len(blocks)} blocks, none for {name}; take a smaller block",
            )
    return {name: found[name] for name in SPLITS}


def _gather(runs: Sequence[NDArray[np.int64]], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the blocks in the chosen runs, ascending."""
    parts = [runs[index] for index in np.sort(chosen)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """Hides tokens that are to be predicted, the same number in every block.

    Of those, 80 % become the mask token, 10 % a random one, and 10 % stay (Devlin et al., 2019).

    Attributes:
        share: share of the text's tokens.
        token: the mask token.
        vocabulary: random tokens are below it.
        first: where the text begins in a block.
        last: how many tokens follow it.
    """

    share: float
    token: int
    vocabulary: int
    first: int
    last: int

    def __call__(self, blocks: NDArray[np.int64], generator: np.random.RandomState) -> Any:
        """Inputs and targets (B, L). A block's draws are the same whatever the batch is."""
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
    """One epoch of blocks, the last partial batch included; each iteration gives the same.

    Attributes:
        blocks: the tokens.
        batch_size: blocks in a batch.
        masking: what is hidden; None predicts each token from those before it.
        seed: order and masks; None keeps the order and has fixed masks.
    """

    blocks: Blocks
    batch_size: int
    masking: Masking | None
    seed: int | None = None

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.blocks) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets (B, L), int64; targets that do not count are `IGNORED`."""
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
    """SHA-256 over names, shapes and contents of the splits, in hexadecimal."""
    total = hashlib.sha256()
    for name, blocks in splits.items():
        total.update(f"{name}{blocks.shape}".encode())
        total.update(np.ascontiguousarray(blocks).data)
    return total.hexdigest()
