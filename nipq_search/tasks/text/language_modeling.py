"""Language models on running text: masked tokens, or the next token."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nipq_search.tasks.base import check_batch_size, evaluating, named_split
from nipq_search.tasks.common.arguments import (
    distinct,
    flag,
    mapping,
    most,
    number,
    parts,
    paths,
    positive,
    refuse,
    seed,
    word,
)
from nipq_search.tasks.text.corpus import (
    IGNORED,
    BlockBatches,
    Blocks,
    Frame,
    Masking,
    digest_blocks,
    read_blocks,
    split_blocks,
)
from nipq_search.tasks.text.files import find_files
from nipq_search.tasks.text.language_models import (
    ModelSource,
    hidden_loss,
    load_model,
    load_tokenizer,
)

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
    """What both tasks share. Batches are (inputs, targets), both (B, L) int64."""

    metric: tuple[str, str] = ("perplexity", "min")
    input_bits: int | None = None
    name: ClassVar[str]
    factory: ClassVar[str]
    evaluation_batch: ClassVar[int] = 16

    def __init__(
        self,
        *,
        model: str,
        path: str | Sequence[str],
        encoding: str = "utf-8",
        block: int = 128,
        validation: float | str | Sequence[str] = 0.1,
        test: float | str | Sequence[str] = 0.1,
        train_samples: int | None = None,
        split_seed: int = 0,
        train_from_scratch: bool = False,
        config: Mapping[str, Any] | None = None,
        dropout: float | None = 0.0,
        hidden_weight: float = 0.0,
    ) -> None:
        """Check and keep the arguments; files are read later.

        Args:
            model: folder of a transformers checkpoint, `package://PACKAGE/FOLDER`, or a hub name.
            path: text files, folders of them, patterns with `*`, or `package://PACKAGE/FILE`;
                those that `validation` or `test` name are left out.
            encoding: of the files.
            block: tokens of a sample.
            validation: share of the blocks, or files.
            test: the same.
            train_samples: how many blocks to train on; all by default.
            split_seed: decides which blocks go to which split.
            train_from_scratch: random weights in place of the checkpoint's.
            config: overrides of the model's configuration.
            dropout: every dropout probability; None keeps those of the configuration.
            hidden_weight: strength with which distillation matches hidden states too.
        """
        self.paths, self.encoding = paths("path", path), word("encoding", encoding)
        self.block = positive("block", block)
        self.validation, self.test = parts(validation, test)
        self.train_samples = most("train_samples", train_samples)
        self.split_seed = seed("split_seed", split_seed)
        self.hidden_weight = number("hidden_weight", hidden_weight, 0)
        self.source = ModelSource(
            name=model,
            config=mapping("config", config),
            from_scratch=flag("train_from_scratch", train_from_scratch),
            dropout=None if dropout is None else number("dropout", dropout, 0, 1),
        )
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
        if self.block > tokenizer.model_max_length:
            raise refuse("block", f"the model takes {tokenizer.model_max_length} tokens")
        self._masking, self._vocabulary = self.masking(tokenizer), len(tokenizer)

        files = {"path": find_files(self.paths, "task_args.path")}
        for key, part in (("validation", self.validation), ("test", self.test)):
            if not isinstance(part, float):
                files[key] = find_files(part, f"task_args.{key}")
                # A folder may hold the files of all splits.
                files["path"] = [file for file in files["path"] if file not in files[key]]
        if not files["path"]:
            raise refuse("path", "no file is left to train: validation and test name them all")
        distinct("test", files.get("test", ()), files.get("validation", ()))
        own = {
            key: read_blocks(tokenizer, given, self.encoding, self.block)
            for key, given in files.items()
        }
        blocks = own.pop("path")
        self._splits = split_blocks(
            blocks, self.validation, self.test, self.train_samples, self.split_seed, own
        )

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
        if most is not None and self.block > most:
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
    """A model such as BERT fills in hidden tokens; arguments as in `LanguageModeling`, and
    `mask_share`, the share of the tokens that is hidden.
    """

    name = "masked_lm"
    factory = "AutoModelForMaskedLM"

    def __init__(
        self,
        *,
        model: str,
        path: str | Sequence[str],
        encoding: str = "utf-8",
        block: int = 128,
        mask_share: float = 0.15,
        validation: float | str | Sequence[str] = 0.1,
        test: float | str | Sequence[str] = 0.1,
        train_samples: int | None = None,
        split_seed: int = 0,
        train_from_scratch: bool = False,
        config: Mapping[str, Any] | None = None,
        dropout: float | None = 0.0,
        hidden_weight: float = 0.0,
    ) -> None:
        """Check and keep the arguments."""
        super().__init__(
            model=model,
            path=path,
            encoding=encoding,
            block=block,
            validation=validation,
            test=test,
            train_samples=train_samples,
            split_seed=split_seed,
            train_from_scratch=train_from_scratch,
            config=config,
            dropout=dropout,
            hidden_weight=hidden_weight,
        )
        self.mask_share = number("mask_share", mask_share, 0.001, 1)

    def masking(self, tokenizer: Any) -> Masking:
        """The tokenizer's mask token; `UserError` where it has none."""
        if tokenizer.mask_token_id is None:
            raise refuse("model", f"the tokenizer in {self.source.name} has no mask token")
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
