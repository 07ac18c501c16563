"""Classification of texts, or of pairs of them, with a pretrained encoder of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nipq_search.tasks.base import check_batch_size, evaluating, named_split
from nipq_search.tasks.common.arguments import number, one_of, refuse
from nipq_search.tasks.common.package_files import needed
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
"""Figures that may select: share of hits, mean F1 of the classes, Matthews correlation."""


class EncoderClassifier(nn.Module):
    """Encoder, mean over the tokens that are no padding, linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        """Put a new head on `encoder`, whose states have `width` channels."""
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
        """Logits (B, C); with `hidden` also the states (B, L, H), embeddings and every layer."""
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


class TextClassification:
    """Classification of the texts in a table: a pretrained encoder with a new head.

    Args:
        source: the encoder and its tokenizer.
        table: the texts and their labels.
        splits: how rows are divided into splits; the defaults if None.
        lengths: lengths of the tokenized texts; the defaults if None.
        hidden_weight: weight of the hidden states' error in the distillation loss.
        metric: the figure to maximize, one of `METRICS`.
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
        self._splits: Mapping[str, TokenSplit] | None = None
        self._facts: dict[str, Any] = {}

    def load_data(self) -> None:
        """Read and tokenize the data; does nothing the second time."""
        if self._splits is not None:
            return
        with needed(f"task {self.name}", "text"):
            import torchmetrics  # noqa: F401
        tokenizer = load_tokenizer(self.source)
        length = self.lengths.max_length
        if length > tokenizer.model_max_length:
            raise refuse("max_length", f"the model takes {tokenizer.model_max_length} tokens")

        def read(path: str, key: str) -> list[Row]:
            return read_rows(self.table, path, key)

        texts = split_rows(read_rows(self.table), self.table, self.splits, read)
        splits = {
            name: tokenize(tokenizer, rows, texts.classes, length)
            for name, rows in texts.rows.items()
        }
        padding = tokenizer.pad_token_id
        self._facts = {
            "classes": list(texts.classes),
            "dropped": dict(texts.dropped),
            "vocabulary": len(tokenizer),
            "padding": 0 if padding is None else int(padding),
        }
        self._splits = splits

    def split(self, name: str) -> TokenSplit:
        """The texts of one split, read at the first call; `UserError` for an unknown name."""
        self.load_data()
        assert self._splits is not None
        return named_split(self._splits, name)

    def facts(self) -> dict[str, Any]:
        """Classes, dropped rows, size of the vocabulary and the token that pads."""
        self.load_data()
        return self._facts

    def dataset(self) -> dict[str, Any]:
        """Name, sizes and digest of the data, the classes, and how many rows were dropped."""
        facts = self.facts()
        assert self._splits is not None
        return {
            "name": self.name,
            "splits": {name: len(split) for name, split in self._splits.items()},
            "digest": digest_tokens(self._splits, facts["classes"]),
            "classes": facts["classes"],
            "dropped": facts["dropped"],
        }

    def sample_keys(self, split: str) -> Iterator[bytes]:
        """The tokens of each text, as bytes."""
        found = self.split(split)
        for start, end in zip(found.offsets[:-1], found.offsets[1:], strict=True):
            yield found.ids[start:end].tobytes()

    def build_model(self) -> nn.Module:
        """The checkpoint's encoder with a new head."""
        facts = self.facts()
        encoder: Any = load_model(self.source, "AutoModel", facts["vocabulary"])
        most = getattr(encoder.config, "max_position_embeddings", None)
        if most is not None and self.lengths.max_length > most:
            raise refuse("max_length", f"the model takes {most} tokens")
        return EncoderClassifier(encoder, encoder.config.hidden_size, len(facts["classes"]))

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One text of `example_length` tokens without padding: costs are those of this length."""
        split, length = self.split("train"), self.lengths.cost_length
        ids = torch.from_numpy(np.resize(split.ids[:length], length).astype(np.int64))[None]
        example = (ids, torch.ones_like(ids))
        return example if split.types is None else (*example, torch.zeros_like(ids))

    def loader(self, split: str, batch_size: int, seed: int | None = None) -> TextBatches:
        """One epoch; `seed` orders the training split and is unused elsewhere."""
        check_batch_size(batch_size)
        return TextBatches(
            split=self.split(split),
            batch_size=batch_size,
            padding=self.facts()["padding"],
            seed=seed if split == "train" else None,
            similar_lengths=self.lengths.similar_lengths,
        )

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Logits, and hidden states where distillation wants them.

        `loss` and `distill_loss` both come here, so a caller may hand in a model that remembers
        its last output.
        """
        if self.hidden_weight == 0:
            return model(*batch[:-1]), None
        logits, states = model(*batch[:-1], hidden=True)
        return logits, states

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(self._forward(model, batch)[0], batch[-1])

    def distill_loss(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy with the teacher's probabilities, in nats.

        Plus `hidden_weight` times the mean squared error of the hidden states, as a share of the
        teacher's variance.
        """
        with torch.no_grad():
            wanted, wanted_states = self._forward(teacher, batch)
        logits, states = self._forward(model, batch)
        loss = F.cross_entropy(logits, wanted.softmax(dim=1))
        if self.hidden_weight > 0:
            loss = loss + self.hidden_weight * hidden_loss(states, wanted_states, batch[1])
        return loss

    def num_samples(self, batch: Batch) -> int:
        """Texts in the batch."""
        return len(batch[-1])

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """`accuracy`, macro `f1`, `matthews` correlation and mean `loss` in nats of a split."""
        with needed(f"task {self.name}", "text"):
            from torchmetrics.functional import classification as figures
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
        arrays, loader = self.split(split), self.loader(split, self.evaluation_batch)
        # By length: no batch is wider than it must be.
        order = np.argsort(arrays.lengths, kind="stable")
        outputs = []
        with evaluating(model):
            for start in range(0, len(order), self.evaluation_batch):
                batch = loader.batch(order[start : start + self.evaluation_batch])
                inputs = [tensor.to(device) for tensor in batch[:-1]]
                outputs.append(model(*inputs).float().cpu())
        logits, labels = torch.cat(outputs), torch.from_numpy(arrays.labels[order])
        classes, hits = logits.shape[1], logits.argmax(dim=1)
        return {
            "accuracy": float(figures.multiclass_accuracy(hits, labels, classes, average="micro")),
            "f1": float(figures.multiclass_f1_score(hits, labels, classes, average="macro")),
            "matthews": float(figures.multiclass_matthews_corrcoef(hits, labels, classes)),
            "loss": float(F.cross_entropy(logits, labels)),
        }
