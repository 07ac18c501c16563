"""Language models on running text: masked tokens, or the next token."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nipq_search.tasks.base import check_batch_size, evaluating, named_split
from nipq_search.tasks.common.arguments import number, refuse
from nipq_search.tasks.text.corpus import (
    IGNORED,
    BlockBatches,
    Blocks,
    Corpus,
    Frame,
    Masking,
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


class TokenPredictor(nn.Module):
    """A language model of transformers that takes and returns tensors."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        """Wrap `model`, which gets `options` at every call."""
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, input_ids: Tensor, *, hidden: bool = False) -> Any:
        """Logits (B, L, V); with `hidden` also the states (B, L, H) of every layer."""
        output = self.model(
            input_ids=input_ids, output_hidden_states=hidden, return_dict=True, **self.options
        )
        return (output.logits, output.hidden_states) if hidden else output.logits


class LanguageModeling(abc.ABC):
    """Base of both language modeling tasks.

    Batches are (inputs, targets), both (B, L) int64.

    Args:
        source: the model and its tokenizer.
        corpus: the text.
        splits: how blocks are divided into splits; the defaults if None.
        hidden_weight: weight of the hidden states' error in the distillation loss.
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
        self._splits: Mapping[str, Blocks] | None = None
        self._vocabulary = 0
        self._masking: Masking | None = None

    def masking(self, tokenizer: Any) -> Masking | None:
        """What is hidden from the model; None for a model that predicts the next token."""
        return None

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model that is trained."""
        return TokenPredictor(model)

    def load_data(self) -> None:
        """Read and tokenize the text; does nothing the second time."""
        if self._splits is not None:
            return
        tokenizer = load_tokenizer(self.source)
        length = self.corpus.block
        if length > tokenizer.model_max_length:
            raise refuse("block", f"the model takes {tokenizer.model_max_length} tokens")
        self._masking, self._vocabulary = self.masking(tokenizer), len(tokenizer)
        own = {
            key: read_blocks(tokenizer, files, self.corpus.encoding, length)
            for key, files in self.corpus.files(self.splits).items()
        }
        blocks = own.pop("path")
        self._splits = split_blocks(blocks, self.splits, own)

    def split(self, name: str) -> Blocks:
        """The blocks of one split, read at the first call; `UserError` for an unknown name."""
        self.load_data()
        assert self._splits is not None
        return named_split(self._splits, name)

    def dataset(self) -> dict[str, Any]:
        """Name, blocks by split and digest of the data."""
        self.load_data()
        assert self._splits is not None
        return {
            "name": self.name,
            "splits": {name: len(blocks) for name, blocks in self._splits.items()},
            "digest": digest_blocks(self._splits),
        }

    def sample_keys(self, split: str) -> Iterator[bytes]:
        """The tokens of each block, as bytes."""
        return (block.tobytes() for block in self.split(split))

    def build_model(self) -> nn.Module:
        """The checkpoint's model."""
        self.load_data()
        model: Any = load_model(self.source, self.factory, self._vocabulary)
        most = getattr(model.config, "max_position_embeddings", None)
        if most is not None and self.corpus.block > most:
            raise refuse("block", f"the model takes {most} tokens")
        return self.wrap(model)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """The first block of the training split, (1, L)."""
        return (torch.from_numpy(self.split("train")[:1].astype(np.int64)),)

    def loader(self, split: str, batch_size: int, seed: int | None = None) -> BlockBatches:
        """One epoch; `seed` orders and masks the training split and is unused elsewhere."""
        check_batch_size(batch_size)
        return BlockBatches(
            blocks=self.split(split),
            batch_size=batch_size,
            masking=self._masking,
            seed=seed if split == "train" else None,
        )

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Logits (N, V) of the predicted positions, and hidden states if they are wanted.

        `loss` and `distill_loss` both come here, so a caller may hand in a model that remembers
        its last output.
        """
        inputs, targets = batch
        states = None
        if self.hidden_weight > 0:
            logits, states = model(inputs, hidden=True)
        else:
            logits = model(inputs)
        return logits[targets != IGNORED], states

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the predicted tokens in nats."""
        targets = batch[1]
        return F.cross_entropy(self._forward(model, batch)[0], targets[targets != IGNORED])

    def distill_loss(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy with the teacher's probabilities of the predicted tokens, in nats.

        Plus `hidden_weight` times the mean squared error of the hidden states, as a share of the
        teacher's variance.
        """
        with torch.no_grad():
            wanted, wanted_states = self._forward(teacher, batch)
        logits, states = self._forward(model, batch)
        loss = F.cross_entropy(logits, wanted.softmax(dim=1))
        if self.hidden_weight > 0:
            every = torch.ones_like(batch[0])
            loss = loss + self.hidden_weight * hidden_loss(states, wanted_states, every)
        return loss

    def num_samples(self, batch: Batch) -> int:
        """Blocks in the batch."""
        return len(batch[0])

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """`perplexity`, mean `loss` in nats and `accuracy` of the predicted tokens of a split."""
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
        loss = torch.zeros((), dtype=torch.float64, device=device)
        hits = torch.zeros((), dtype=torch.int64, device=device)
        count = 0
        with evaluating(model):
            for inputs, targets in self.loader(split, self.evaluation_batch):
                kept = targets != IGNORED
                wanted = targets[kept].to(device)
                logits = model(inputs.to(device))[kept.to(device)].float()
                loss += F.cross_entropy(logits, wanted, reduction="sum")
                hits += (logits.argmax(dim=1) == wanted).sum()
                count += len(wanted)
        mean = float(loss) / count
        # Beyond 700 nats the exponential is no number any more.
        return {
            "perplexity": math.exp(min(mean, 700.0)),
            "loss": mean,
            "accuracy": int(hits) / count,
        }


class MaskedLanguageModeling(LanguageModeling):
    """Prediction of masked tokens with a model such as BERT.

    Args:
        source: the model and its tokenizer.
        corpus: the text.
        splits: how blocks are divided into splits; the defaults if None.
        mask_share: share of the tokens to mask.
        hidden_weight: weight of the hidden states' error in the distillation loss.
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
        """The tokenizer's mask token; `UserError` where it has none."""
        if tokenizer.mask_token_id is None:
            raise refuse("model", f"the tokenizer in {self.source.model} has no mask token")
        frame = Frame.of(tokenizer)
        return Masking(
            share=self.mask_share,
            token=int(tokenizer.mask_token_id),
            vocabulary=len(tokenizer),
            first=len(frame.before),
            last=len(frame.after),
        )


class CausalLanguageModeling(LanguageModeling):
    """A model such as GPT predicts each token from those before it."""

    name = "causal_lm"
    factory = "AutoModelForCausalLM"

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model without its cache; `UserError` if it looks ahead."""
        predictor = TokenPredictor(model, use_cache=False)
        ids = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 3]]) % self._vocabulary
        with evaluating(predictor):
            one, other = predictor(ids)
        if not torch.allclose(one[:3], other[:3], atol=1e-4):
            raise refuse(
                "model",
                "it sees the tokens that it is to predict; take a decoder, or set "
                "`config: {is_decoder: true}`",
            )
        return predictor
