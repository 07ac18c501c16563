"""Tokenized texts as flat arrays, and batches padded to the length of their longest text."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nipq_search.tasks.common.arguments import flag, integer
from nipq_search.tasks.text.table import Row

_TEXTS_AT_ONCE = 1000
"""Maximum number of texts that are tokenized in one call."""

_BATCHES_IN_A_BUCKET = 50
"""Number of batches' texts that are sorted by length together."""

MIN_LENGTH = 8
"""Smallest valid `max_length`; below it, special tokens leave hardly any room for text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLengths:
    """Lengths of the tokenized texts.

    Attributes:
        max_length: maximum number of tokens in a text; further tokens are cut off.
        example_length: number of tokens in the text for which costs are computed; None uses
            `max_length`.
        similar_lengths: whether to train on batches of texts with similar lengths, which need
            less padding.
    """

    max_length: int = 128
    example_length: int | None = None
    similar_lengths: bool = False

    def __post_init__(self) -> None:
        """Check every argument."""
        integer("max_length", self.max_length, MIN_LENGTH, 1_000_000)
        if self.example_length is not None:
            integer("example_length", self.example_length, 1, self.max_length)
        flag("similar_lengths", self.similar_lengths)

    @property
    def cost_length(self) -> int:
        """Number of tokens in the text for which costs are computed."""
        return self.max_length if self.example_length is None else self.example_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """Concatenated texts; text i consists of the tokens from `offsets[i]` to `offsets[i + 1]`.

    All fields are numpy arrays, because Ray's object store shares arrays between the processes of
    a node without copying them. Shared arrays are read-only, so no method writes to them.

    Attributes:
        ids: token ids of all texts, (T,) int32.
        offsets: start of each text, and the total length, (N + 1,) int64.
        types: for each token, 0 or 1 for the first or second text of its pair, (T,) uint8; None
            if there are no pairs.
        labels: class index of each text, (N,) int64.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    types: NDArray[np.uint8] | None
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each text, (N,)."""
        return np.diff(self.offsets)


def tokenize(
    tokenizer: Any, rows: Sequence[Row], classes: Sequence[str], max_length: int
) -> TokenSplit:
    """Tokenize texts.

    Args:
        tokenizer: a fast or slow transformers tokenizer.
        rows: the texts, either all single texts or all pairs.
        classes: the classes, in order.
        max_length: maximum number of tokens in a text; further tokens are cut off.

    Returns:
        The tokens and the class indices of the texts.
    """
    ids: list[NDArray[np.int32]] = []
    types: list[NDArray[np.uint8]] = []
    paired = bool(rows) and rows[0].text_pair is not None
    for start in range(0, len(rows), _TEXTS_AT_ONCE):
        chunk = rows[start : start + _TEXTS_AT_ONCE]
        encoded = tokenizer(
            [row.text for row in chunk],
            [row.text_pair for row in chunk] if paired else None,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )
        ids += [np.array(text, dtype=np.int32) for text in encoded["input_ids"]]
        if paired and "token_type_ids" in encoded:
            types += [np.array(text, dtype=np.uint8) for text in encoded["token_type_ids"]]
    index = {label: number for number, label in enumerate(classes)}
    lengths = [len(text) for text in ids]
    return TokenSplit(
        ids=np.concatenate(ids),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        types=np.concatenate(types) if types else None,
        labels=np.array([index[row.label] for row in rows], dtype=np.int64),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextBatches:
    """One epoch of a split, including the last partial batch; each pass yields equal batches.

    Attributes:
        split: the texts.
        batch_size: texts per batch.
        padding: id of the padding token.
        seed: seed for the order; None keeps the order of the arrays.
        similar_lengths: with a seed, group texts of similar lengths into batches and shuffle the
            batches, which reduces padding.
    """

    split: TokenSplit
    batch_size: int
    padding: int
    seed: int | None = None
    similar_lengths: bool = False

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield int64 tokens, mask and, for pairs, token types, all (B, L), and labels (B,)."""
        order = self._order()
        for start in range(0, len(order), self.batch_size):
            yield self.batch(order[start : start + self.batch_size])

    def _order(self) -> NDArray[np.int64]:
        """Return the indices of the texts in the order in which they are used."""
        count = len(self.split)
        if self.seed is None:
            return np.arange(count)
        generator = torch.Generator().manual_seed(self.seed)
        order: NDArray[np.int64] = torch.randperm(count, generator=generator).numpy()
        if not self.similar_lengths:
            return order
        lengths, bucket = self.split.lengths, self.batch_size * _BATCHES_IN_A_BUCKET
        order = np.concatenate(
            [
                texts[np.argsort(lengths[texts], kind="stable")]
                for texts in (order[start : start + bucket] for start in range(0, count, bucket))
            ]
        )
        # The partial batch stays last, so that all batches before it are complete.
        whole = count // self.batch_size
        batches = order[: whole * self.batch_size].reshape(whole, self.batch_size)
        shuffled = batches[torch.randperm(whole, generator=generator).numpy()]
        return np.concatenate([shuffled.reshape(-1), order[whole * self.batch_size :]])

    def batch(self, index: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Return a batch that contains the texts with the given indices."""
        split = self.split
        lengths = split.lengths[index][:, None]
        columns = np.arange(lengths.max())[None]
        mask = columns < lengths
        positions = (split.offsets[index][:, None] + columns)[mask]
        ids = np.full(mask.shape, self.padding, dtype=np.int64)
        ids[mask] = split.ids[positions]
        tensors = [torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))]
        if split.types is not None:
            types = np.zeros(mask.shape, dtype=np.int64)
            types[mask] = split.types[positions]
            tensors.append(torch.from_numpy(types))
        return (*tensors, torch.from_numpy(split.labels[index]))


def digest_tokens(splits: Mapping[str, TokenSplit], classes: Sequence[str]) -> str:
    """Return the SHA-256 of the classes, split names and split contents, in hexadecimal."""
    total = hashlib.sha256(repr(tuple(classes)).encode())
    for name, split in splits.items():
        total.update(f"{name}{len(split)}".encode())
        for array in (split.ids, split.offsets, split.types, split.labels):
            if array is not None:
                total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
