"""The tasks `masked_lm` and `causal_lm`: masked-token and next-token prediction in plain text."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nipq_search.tasks.base import check_batch_size, evaluating, named_split
from nipq_search.tasks.common.arguments import argument_error, number
from nipq_search.tasks.text.corpus import (
    IGNORED,
    BlockBatches,
    Blocks,
    Corpus,
    Masking,
    SpecialTokens,
    digest_blocks,
    read_blocks,
    split_blocks,
)
from nipq_search.tasks.text.language_models import (
    ModelSource,
    hidden_loss,
    load_model,
    load_tokenizer,
)
from nipq_search.tasks.text.splits import TextSplits

Batch = tuple[Tensor, Tensor]

MAX_EXPONENT = 700.0
"""Largest mean loss in nats whose exponential, the perplexity, is a finite float."""


class TokenPredictor(nn.Module):
    """A transformers language model with tensors as inputs and outputs."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        """Wrap `model`; `options` are passed to every call."""
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, input_ids: Tensor, *, hidden: bool = False) -> Any:
        """Return the logits (B, L, V); with `hidden`, also a tuple of hidden states (B, L, H)."""
        output = self.model(
            input_ids=input_ids, output_hidden_states=hidden, return_dict=True, **self.options
        )
        return (output.logits, output.hidden_states) if hidden else output.logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedCorpus:
    """The tokenized data of a task.

    Attributes:
        splits: blocks by split.
        vocabulary: number of tokens in the tokenizer's vocabulary.
        masking: how tokens are masked; None selects next-token prediction.
    """

    splits: Mapping[str, Blocks]
    vocabulary: int
    masking: Masking | None


class LanguageModeling(abc.ABC):
    """Base class for the two language modeling tasks.

    Batches are (inputs, targets), both (B, L) int64.

    Args:
        source: the model and its tokenizer.
        corpus: the text.
        splits: how blocks are divided into splits; None uses the defaults.
        hidden_weight: weight of the hidden-state error in the distillation loss.
    """

    metric: tuple[str, str] = ("perplexity", "min")
    input_bits: int | None = None
    name: ClassVar[str]
    factory: ClassVar[str]
    evaluation_batch: ClassVar[int] = 16
    argument_sections: ClassVar[Mapping[str, type]] = {
        "source": ModelSource,
        "corpus": Corpus,
        "splits": TextSplits,
    }

    def __init__(
        self,
        *,
        source: ModelSource,
        corpus: Corpus,
        splits: TextSplits | None = None,
        hidden_weight: float = 0.0,
    ) -> None:
        """Check and store the arguments; files are read later."""
        self.source, self.corpus, self.splits = source, corpus, splits or TextSplits()
        self.hidden_weight = number("hidden_weight", hidden_weight, 0)
        self._tokenized: TokenizedCorpus | None = None

    def masking(self, tokenizer: Any) -> Masking | None:
        """Return how tokens are masked, or None for next-token prediction."""
        return None

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module to train, a wrapper around a transformers model."""
        return TokenPredictor(model)

    def load_data(self) -> None:
        """Read and tokenize the text; later calls have no effect."""
        if self._tokenized is not None:
            return
        tokenizer = load_tokenizer(self.source)
        self._check_length(tokenizer.model_max_length)
        masking = self.masking(tokenizer)
        own = {
            key: read_blocks(tokenizer, files, self.corpus.encoding, self.corpus.block)
            for key, files in self.corpus.files(self.splits).items()
        }
        blocks = own.pop("path")
        self._tokenized = TokenizedCorpus(
            splits=split_blocks(blocks, self.splits, own),
            vocabulary=len(tokenizer),
            masking=masking,
        )

    def _check_length(self, limit: int | None) -> None:
        """Raise `UserError` if blocks are longer than the model allows."""
        if limit is not None and self.corpus.block > limit:
            raise argument_error("block", f"the model accepts at most {limit} tokens")

    def tokenized(self) -> TokenizedCorpus:
        """Return the tokenized data, which are read on the first call."""
        self.load_data()
        assert self._tokenized is not None
        return self._tokenized

    def split(self, name: str) -> Blocks:
        """Return the blocks of one split, or raise `UserError` if the name is unknown."""
        return named_split(self.tokenized().splits, name)

    def dataset(self) -> dict[str, Any]:
        """Return the name, the number of blocks by split, and the digest of the data."""
        splits = self.tokenized().splits
        return {
            "name": self.name,
            "splits": {name: len(blocks) for name, blocks in splits.items()},
            "digest": digest_blocks(splits),
        }

    def sample_keys(self, split: str) -> Iterator[bytes]:
        """Yield the tokens of each block as bytes."""
        return (block.tobytes() for block in self.split(split))

    def build_model(self) -> nn.Module:
        """Return the wrapped language model.

        It is pretrained or, with `train_from_scratch`, randomly initialized.
        """
        model: Any = load_model(self.source, self.factory, self.tokenized().vocabulary)
        self._check_length(getattr(model.config, "max_position_embeddings", None))
        return self.wrap(model)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return the first block of the training split, (1, L)."""
        return (torch.from_numpy(self.split("train")[:1].astype(np.int64)),)

    def loader(self, split: str, batch_size: int, seed: int | None = None) -> BlockBatches:
        """Return one epoch of a split.

        Args:
            split: `train`, `validation` or `test`.
            batch_size: blocks per batch.
            seed: seed for the order and the masks; used for the training split only.

        Returns:
            Batches of inputs and targets.
        """
        check_batch_size(batch_size)
        return BlockBatches(
            blocks=self.split(split),
            batch_size=batch_size,
            masking=self.tokenized().masking,
            seed=seed if split == "train" else None,
        )

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Return the logits (N, V) at the predicted positions, and the hidden states or None.

        The hidden states are computed only if distillation uses them.
        `loss` and `distill_loss` make the same call, so a caller can pass a model that caches its
        last output.
        """
        inputs, targets = batch
        states = None
        if self.hidden_weight > 0:
            logits, states = model(inputs, hidden=True)
        else:
            logits = model(inputs)
        return logits[targets != IGNORED], states

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy in nats over the tokens to predict."""
        targets = batch[1]
        return F.cross_entropy(self._forward(model, batch)[0], targets[targets != IGNORED])

    def distill_loss(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy with the teacher's probabilities as targets.

        The error of the hidden states, relative to the teacher's variance, is added with the
        weight `hidden_weight`.

        Args:
            model: the model to train.
            teacher: the model to imitate.
            batch: inputs and targets; the targets serve only to select the predicted positions.

        Returns:
            A scalar in nats.
        """
        with torch.no_grad():
            teacher_logits, teacher_states = self._forward(teacher, batch)
        logits, states = self._forward(model, batch)
        loss = F.cross_entropy(logits, teacher_logits.softmax(dim=1))
        if self.hidden_weight > 0:
            mask = torch.ones_like(batch[0])
            loss = loss + self.hidden_weight * hidden_loss(states, teacher_states, mask)
        return loss

    def num_samples(self, batch: Batch) -> int:
        """Return the number of blocks in a batch."""
        return len(batch[0])

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return the `perplexity`, mean `loss` in nats and `accuracy` of the predictions."""
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
        loss = torch.zeros((), dtype=torch.float64, device=device)
        hits = torch.zeros((), dtype=torch.int64, device=device)
        count = 0
        with evaluating(model):
            for inputs, targets in self.loader(split, self.evaluation_batch):
                predicted = targets != IGNORED
                labels = targets[predicted].to(device)
                logits = model(inputs.to(device))[predicted.to(device)].float()
                loss += F.cross_entropy(logits, labels, reduction="sum")
                hits += (logits.argmax(dim=1) == labels).sum()
                count += len(labels)
        mean = float(loss) / count
        return {
            "perplexity": math.exp(min(mean, MAX_EXPONENT)),
            "loss": mean,
            "accuracy": int(hits) / count,
        }


class MaskedLanguageModeling(LanguageModeling):
    """Prediction of masked tokens with a model such as BERT.

    Args:
        source: the model and its tokenizer.
        corpus: the text.
        splits: how blocks are divided into splits; None uses the defaults.
        mask_share: share of the tokens to predict, most of which are masked; see `Masking`.
        hidden_weight: weight of the hidden-state error in the distillation loss.
    """

    name = "masked_lm"
    factory = "AutoModelForMaskedLM"

    def __init__(
        self,
        *,
        source: ModelSource,
        corpus: Corpus,
        splits: TextSplits | None = None,
        mask_share: float = 0.15,
        hidden_weight: float = 0.0,
    ) -> None:
        """Check and store the arguments; files are read later."""
        super().__init__(source=source, corpus=corpus, splits=splits, hidden_weight=hidden_weight)
        self.mask_share = number("mask_share", mask_share, 0.001, 1)

    def masking(self, tokenizer: Any) -> Masking:
        """Return how tokens are masked.

        Raises:
            UserError: the tokenizer has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise argument_error(
                "model", f"the tokenizer in {self.source.model} has no mask token"
            )
        special = SpecialTokens.of(tokenizer)
        return Masking(
            share=self.mask_share,
            token=int(tokenizer.mask_token_id),
            vocabulary=len(tokenizer),
            first=len(special.before),
            last=len(special.after),
        )


class CausalLanguageModeling(LanguageModeling):
    """Prediction of each token from the previous ones with a model such as GPT."""

    name = "causal_lm"
    factory = "AutoModelForCausalLM"

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module to train, which calls the model without its key-value cache.

        Raises:
            UserError: the model's predictions depend on later tokens.
        """
        predictor = TokenPredictor(model, use_cache=False)
        ids = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 3]]) % self.tokenized().vocabulary
        with evaluating(predictor):
            one, other = predictor(ids)
        if not torch.allclose(one[:3], other[:3], atol=1e-4):
            raise argument_error(
                "model",
                "its predictions depend on later tokens; use a decoder, or set "
                "`config: {is_decoder: true}`",
            )
        return predictor
