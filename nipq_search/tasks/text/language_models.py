"""Transformers' models and tokenizers from a folder, an installed package or the hub.

Checkpoints that lack weights are refused, where transformers would fill in random ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nipq_search.errors import UserError, nearest, one_line
from nipq_search.tasks.base import unreadable
from nipq_search.tasks.common.arguments import flag, mapping, number, refuse
from nipq_search.tasks.common.hub import hub, silent
from nipq_search.tasks.common.package_files import PREFIX, anchored, needed, resolve
from nipq_search.tasks.common.sections import store

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""A tokenizer's folder holds at least one of these."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.safetensors.index.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A checkpoint of transformers and the changes to its configuration.

    Attributes:
        model: folder of the checkpoint, `package://PACKAGE/FOLDER`, or a name on the hub. Its
            tokenizer is used.
        config: overrides of the model's configuration; with `model_type`, a complete
            configuration.
        train_from_scratch: start from random weights instead of those of the checkpoint.
        dropout: value of every dropout probability; None keeps those of the configuration.
    """

    model: str
    config: Mapping[str, Any] | None = None
    train_from_scratch: bool = False
    dropout: float | None = 0.0

    def __post_init__(self) -> None:
        """Check every argument and make the path of a folder absolute."""
        flag("train_from_scratch", self.train_from_scratch)
        if self.dropout is not None:
            store(self, dropout=number("dropout", self.dropout, 0, 1))
        store(self, model=anchored(self.model), config=mapping("config", self.config))
        if self.config and "model_type" in self.config and not self.train_from_scratch:
            raise refuse(
                "config",
                "with model_type it describes a new model: set train_from_scratch to true, or "
                "remove model_type to change the checkpoint's own configuration",
            )


def transformers() -> Any:
    """The library; `UserError` where it is not installed."""
    with needed("a text task", "text"):
        import transformers
    return transformers


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer; `UserError` where there is none."""
    place, options = _locate(source)
    if isinstance(place, Path) and not any((place / name).is_file() for name in TOKENIZER_FILES):
        raise refuse("model", f"no tokenizer in {place}: none of {', '.join(TOKENIZER_FILES)}")
    with _quiet(), _loading(source, "tokenizer"):
        tokenizer = transformers().AutoTokenizer.from_pretrained(str(place), **options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise refuse("model", f"the tokenizer in {place} has no vocabulary")
    return tokenizer


def load_config(source: ModelSource, vocabulary: int) -> Any:
    """The model's configuration with the overrides.

    Args:
        source: which model.
        vocabulary: size of the tokenizer's; that of a model with a whole configuration of its own.

    Raises:
        UserError: there is none, a key is unknown, or the model has fewer embeddings than tokens.
    """
    library = transformers()
    changes = dict(source.config or {})
    if "model_type" in changes:
        changes.setdefault("vocab_size", vocabulary)
        kind = changes.pop("model_type")
        with _loading(source, "configuration"):
            config = library.AutoConfig.for_model(kind, **changes)
    else:
        place, options = _locate(source)
        if isinstance(place, Path) and not (place / "config.json").is_file():
            raise refuse("model", f"no config.json in {place}; is it a transformers checkpoint?")
        with _quiet(), _loading(source, "configuration"):
            config = library.AutoConfig.from_pretrained(str(place), **options, **changes)
    # A configuration keeps every key that it is given, so a new one knows which it has by itself.
    known = {*type(config)().to_dict(), *config.attribute_map}
    for key in changes:
        if key not in known:
            hint = nearest(key, known)
            hint = hint if "did you mean" in hint else ""
            raise refuse(f"config.{key}", f"{config.model_type} models have no such key{hint}")
    if config.is_encoder_decoder:
        raise refuse("model", f"{config.model_type} is an encoder-decoder; those are unsupported")
    if config.vocab_size < vocabulary:
        raise refuse(
            "model", f"{config.vocab_size} embeddings for a tokenizer of {vocabulary} tokens"
        )
    if source.dropout is not None:
        for key, value in config.to_dict().items():
            if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, int | float):
                setattr(config, key, source.dropout)
    return config


def load_model(source: ModelSource, factory: str, vocabulary: int) -> nn.Module:
    """The model in float32.

    Args:
        source: which model.
        factory: name of transformers' class, such as `AutoModel`.
        vocabulary: size of the tokenizer's.

    Raises:
        UserError: no such model, or the checkpoint does not hold all of its weights.
    """
    library = transformers()
    config = load_config(source, vocabulary)
    maker = getattr(library, factory)
    if type(config) not in maker._model_mapping:
        raise refuse("model", f"{config.model_type} models are no kind of {factory}")
    if source.train_from_scratch:
        with _quiet(), _loading(source, "model"):
            return _finished(maker.from_config(config, dtype=torch.float32))
    place, options = _locate(source)
    if isinstance(place, Path) and not any(any(place.glob(name)) for name in WEIGHT_FILES):
        raise refuse("model", f"no weights in {place}; set train_from_scratch for random ones")
    with _quiet(), _loading(source, "model"):
        # transformers says of files that may not be read that they are not there.
        for file in place.iterdir() if isinstance(place, Path) else ():
            if file.is_file():
                file.open("rb").close()
        model, info = maker.from_pretrained(
            str(place),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **options,
        )
    if wrong := sorted(info["mismatched_keys"]):
        key, there, here = wrong[0]
        raise refuse(
            "model",
            f"{source.model}: {key} has shape {tuple(there)} in the checkpoint and {tuple(here)} "
            "in the configuration; take the configuration that belongs to the weights",
        )
    # The pooler on top of the first token is removed below, so nobody misses it.
    missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)
    if missing:
        names = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise refuse(
            "model",
            f"the checkpoint lacks {len(missing)} weights of {type(model).__name__}: {names}; "
            "take a checkpoint of such a model, or set train_from_scratch",
        )
    for key, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise refuse("model", f"{source.model}: weights are not finite: {key}")
    return _finished(model)


def _finished(model: nn.Module) -> nn.Module:
    """Without the pooler, which no task reads."""
    if getattr(model, "pooler", None) is not None:
        model.register_module("pooler", None)
    return model.train()


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Mean squared error of hidden states over the teacher's variance, averaged over layers.

    Args:
        student: hidden states (B, L, H), the embeddings first, which are left out.
        teacher: the same of the teacher.
        mask: (B, L), 1 where a token counts.
    """
    weight = mask.unsqueeze(-1).float()
    total = torch.zeros((), device=student[0].device)
    for own, other in zip(student[1:], teacher[1:], strict=True):
        own, other = own.float(), other.float()
        count = weight.sum() * own.shape[-1]
        mean = (other * weight).sum() / count
        variance = ((other - mean).square() * weight).sum() / count
        error = ((own - other).square() * weight).sum() / count
        total = total + error / variance.clamp(min=1e-12)
    return total / max(1, len(student) - 1)


def _locate(source: ModelSource) -> tuple[Path | str, dict[str, Any]]:
    """A folder or a hub name, and options of `from_pretrained`."""
    options: dict[str, Any] = {"trust_remote_code": False}
    place = resolve(source.model, "task_args.model")
    if place.is_dir():
        # transformers asks the hub about some folders unless told not to.
        return place, {**options, "local_files_only": True}
    name = source.model
    is_path = name.startswith((PREFIX, ".", "/", "~")) or name.count("/") > 1
    if is_path or place.exists():
        raise refuse("model", f"no folder {place}")
    return name, options


@contextlib.contextmanager
def _loading(source: ModelSource, what: str) -> Iterator[None]:
    """Turn whatever transformers raises into one line."""
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise refuse("model", unreadable(error)) from error
    except Exception as error:
        reason = one_line(error)
        kinds = (OSError, ConnectionError)
        if isinstance(error, kinds) and not resolve(source.model, "task_args.model").is_dir():
            raise refuse(
                "model",
                f"'{source.model}' is no folder here, and the hub did not give its {what} "
                f"({silent() or reason}); name a folder, or fetch the model where there is a "
                "network",
            ) from error
        raise refuse("model", f"{source.model}: the {what} cannot be loaded: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and reports of the library: what is wrong is raised here."""
    logging = transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with hub():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
