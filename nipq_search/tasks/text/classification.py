"""The task `text_classification`: single texts or pairs, classified by a transformers encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nipq_search.tasks.base import check_batch_size, evaluating, named_split
from nipq_search.tasks.common.arguments import argument_error, number, one_of
from nipq_search.tasks.common.extras import requires_extra
from nipq_search.tasks.text.language_models import (
    ModelSource,
    hidden_loss,
    load_model,
    load_tokenizer,
)
from nipq_search.tasks.text.splits import TextSplits, split_rows
from nipq_search.tasks.text.table import Row, TextTable, read_rows
from nipq_search.tasks.text.tokens import (
    TextBatches,
    TextLengths,
    TokenSplit,
    digest_tokens,
    tokenize,
)

Batch = tuple[Tensor, ...]

METRICS = ("accuracy", "f1", "matthews")
"""Metrics that can be maximized: accuracy, macro F1, and the Matthews correlation."""


class EncoderClassifier(nn.Module):
    """An encoder, mean pooling over all tokens except padding, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        """Add a new head to an encoder.

        Args:
            encoder: a transformers model without a head.
            width: size of the encoder's hidden states.
            classes: number of outputs.
        """
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        hidden: bool = False,
    ) -> Any:
        """Compute the logits of a batch.

        Args:
            input_ids: tokens (B, L), int64.
            attention_mask: (B, L), 1 for tokens and 0 for padding.
            token_type_ids: (B, L), 0 or 1 for the first or second text of a pair.
            hidden: whether to return the hidden states as well.

        Returns:
            The logits (B, C). With `hidden`, also a tuple of the hidden states (B, L, H): the
            embeddings and the output of every layer.
        """
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=hidden,
            return_dict=True,
            **more,
        )
        states = output.last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        logits = self.head(pooled)
        return (logits, output.hidden_states) if hidden else logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedTexts:
    """The tokenized data of a task.

    Attributes:
        splits: tokens and labels by split.
        classes: the classes, in order.
        dropped: number of dropped rows by reason.
        vocabulary: number of tokens in the tokenizer's vocabulary.
        padding: id of the padding token.
    """

    splits: Mapping[str, TokenSplit]
    classes: tuple[str, ...]
    dropped: Mapping[str, int]
    vocabulary: int
    padding: int


class TextClassification:
    """Classification of the texts in a table with a transformers encoder and a new head.

    Args:
        source: the encoder and its tokenizer.
        table: the texts and their labels.
        splits: how rows are divided into splits; None uses the defaults.
        lengths: lengths of the tokenized texts; None uses the defaults.
        hidden_weight: weight of the hidden-state error in the distillation loss.
        metric: the metric to maximize, one of `METRICS`.
    """

    name = "text_classification"
    input_bits: int | None = None
    evaluation_batch = 64
    argument_sections: ClassVar[Mapping[str, type]] = {
        "source": ModelSource,
        "table": TextTable,
        "splits": TextSplits,
        "lengths": TextLengths,
    }

    def __init__(
        self,
        *,
        source: ModelSource,
        table: TextTable,
        splits: TextSplits | None = None,
        lengths: TextLengths | None = None,
        hidden_weight: float = 0.0,
        metric: str = "accuracy",
    ) -> None:
        """Check and store the arguments; files are read later."""
        self.metric = (one_of("metric", metric, METRICS), "max")
        self.source, self.table = source, table
        self.splits, self.lengths = splits or TextSplits(), lengths or TextLengths()
        self.hidden_weight = number("hidden_weight", hidden_weight, 0)
        self._tokenized: TokenizedTexts | None = None

    def load_data(self) -> None:
        """Read and tokenize the data; later calls have no effect."""
        if self._tokenized is not None:
            return
        with requires_extra(f"task {self.name}", "text"):
            import torchmetrics  # noqa: F401
        tokenizer = load_tokenizer(self.source)
        length = self.lengths.max_length
        self._check_length(tokenizer.model_max_length)

        def read(path: str, key: str) -> list[Row]:
            return read_rows(self.table, path, key)

        texts = split_rows(read_rows(self.table), self.table, self.splits, read)
        padding = tokenizer.pad_token_id
        self._tokenized = TokenizedTexts(
            splits={
                name: tokenize(tokenizer, rows, texts.classes, length)
                for name, rows in texts.rows.items()
            },
            classes=texts.classes,
            dropped=texts.dropped,
            vocabulary=len(tokenizer),
            padding=0 if padding is None else int(padding),
        )

    def _check_length(self, limit: int | None) -> None:
        """Raise `UserError` if texts can be longer than the model allows."""
        if limit is not None and self.lengths.max_length > limit:
            raise argument_error("max_length", f"the model accepts at most {limit} tokens")

    def tokenized(self) -> TokenizedTexts:
        """Return the tokenized data, which are read on the first call."""
        self.load_data()
        assert self._tokenized is not None
        return self._tokenized

    def split(self, name: str) -> TokenSplit:
        """Return the texts of one split, or raise `UserError` if the name is unknown."""
        return named_split(self.tokenized().splits, name)

    def dataset(self) -> dict[str, Any]:
        """Return the name, split sizes, digest, classes, and numbers of dropped rows by reason."""
        data = self.tokenized()
        classes = list(data.classes)
        return {
            "name": self.name,
            "splits": {name: len(split) for name, split in data.splits.items()},
            "digest": digest_tokens(data.splits, classes),
            "classes": classes,
            "dropped": dict(data.dropped),
        }

    def sample_keys(self, split: str) -> Iterator[bytes]:
        """Yield the tokens of each text as bytes."""
        found = self.split(split)
        for start, end in zip(found.offsets[:-1], found.offsets[1:], strict=True):
            yield found.ids[start:end].tobytes()

    def build_model(self) -> nn.Module:
        """Return the encoder, with the checkpoint's weights or random ones, and a new head."""
        data = self.tokenized()
        encoder: Any = load_model(self.source, "AutoModel", data.vocabulary)
        self._check_length(getattr(encoder.config, "max_position_embeddings", None))
        return EncoderClassifier(encoder, encoder.config.hidden_size, len(data.classes))

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return the tokens, mask and, for pairs, token types of one text, each (1, L).

        The text is the beginning of the training data, cut or repeated to the length L for which
        costs are computed, `TextLengths.cost_length`.
        """
        split, length = self.split("train"), self.lengths.cost_length
        ids = torch.from_numpy(np.resize(split.ids[:length], length).astype(np.int64))[None]
        example = (ids, torch.ones_like(ids))
        return example if split.types is None else (*example, torch.zeros_like(ids))

    def loader(self, split: str, batch_size: int, seed: int | None = None) -> TextBatches:
        """Return one epoch of a split.

        Args:
            split: `train`, `validation` or `test`.
            batch_size: texts per batch.
            seed: seed for the order; used for the training split only.

        Returns:
            Batches of tokens, masks and labels.
        """
        check_batch_size(batch_size)
        return TextBatches(
            split=self.split(split),
            batch_size=batch_size,
            padding=self.tokenized().padding,
            seed=seed if split == "train" else None,
            similar_lengths=self.lengths.similar_lengths,
        )

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Return the logits, and the hidden states if distillation uses them or None otherwise.

        `loss` and `distill_loss` make the same call, so a caller can pass a model that caches its
        last output.
        """
        if self.hidden_weight == 0:
            return model(*batch[:-1]), None
        logits, states = model(*batch[:-1], hidden=True)
        return logits, states

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy in nats."""
        return F.cross_entropy(self._forward(model, batch)[0], batch[-1])

    def distill_loss(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy with the teacher's probabilities as targets.

        The error of the hidden states, relative to the teacher's variance, is added with the
        weight `hidden_weight`.

        Args:
            model: the model to train.
            teacher: the model to imitate.
            batch: tokens, mask and labels; the labels are ignored.

        Returns:
            A scalar in nats.
        """
        with torch.no_grad():
            teacher_logits, teacher_states = self._forward(teacher, batch)
        logits, states = self._forward(model, batch)
        loss = F.cross_entropy(logits, teacher_logits.softmax(dim=1))
        if self.hidden_weight > 0:
            loss = loss + self.hidden_weight * hidden_loss(states, teacher_states, batch[1])
        return loss

    def num_samples(self, batch: Batch) -> int:
        """Return the number of texts in a batch."""
        return len(batch[-1])

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return the `accuracy`, macro `f1`, `matthews` correlation and mean `loss` in nats."""
        with requires_extra(f"task {self.name}", "text"):
            from torchmetrics.functional import classification as metrics
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
        arrays, loader = self.split(split), self.loader(split, self.evaluation_batch)
        # Batches of texts with similar lengths need the least padding.
        order = np.argsort(arrays.lengths, kind="stable")
        outputs = []
        with evaluating(model):
            for start in range(0, len(order), self.evaluation_batch):
                batch = loader.batch(order[start : start + self.evaluation_batch])
                inputs = [tensor.to(device) for tensor in batch[:-1]]
                outputs.append(model(*inputs).float().cpu())
        logits, labels = torch.cat(outputs), torch.from_numpy(arrays.labels[order])
        count, chosen = logits.shape[1], logits.argmax(dim=1)
        return {
            "accuracy": float(metrics.multiclass_accuracy(chosen, labels, count, average="micro")),
            "f1": float(metrics.multiclass_f1_score(chosen, labels, count, average="macro")),
            "matthews": float(metrics.multiclass_matthews_corrcoef(chosen, labels, count)),
            "loss": float(F.cross_entropy(logits, labels)),
        }
