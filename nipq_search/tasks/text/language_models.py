"""Loading of transformers models and tokenizers from a folder, an installed package or the hub.

Checkpoints with missing weights are rejected; transformers would initialize the missing weights at
random.
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
from nipq_search.tasks.common.arguments import argument_error, flag, mapping, number
from nipq_search.tasks.common.extras import requires_extra
from nipq_search.tasks.common.hub import hub_access, unreachable_reason
from nipq_search.tasks.common.package_files import PREFIX, absolute_if_exists, resolve_path
from nipq_search.tasks.common.sections import store

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Names of tokenizer files; a tokenizer's folder contains at least one of them."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.safetensors.index.json")
"""Patterns for the files that contain the weights of a checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A transformers checkpoint and the changes to its configuration.

    Attributes:
        model: folder of the checkpoint, `package://PACKAGE/FOLDER`, or a name on the hub. The
            tokenizer is loaded from there as well.
        config: overrides for the model's configuration; if they include `model_type`, they are
            a complete configuration.
        train_from_scratch: whether to start from random weights instead of the checkpoint's.
        dropout: value for every dropout probability; None keeps those of the configuration.
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
        store(self, model=absolute_if_exists(self.model), config=mapping("config", self.config))
        if self.config and "model_type" in self.config and not self.train_from_scratch:
            raise argument_error(
                "config",
                "with model_type it describes a new model: set train_from_scratch to true, or "
                "remove model_type to change the checkpoint's own configuration",
            )


def transformers() -> Any:
    """Return the module `transformers`, or raise `UserError` if it is not installed."""
    with requires_extra("a text task", "text"):
        import transformers
    return transformers


def load_tokenizer(source: ModelSource) -> Any:
    """Return the model's tokenizer.

    Raises:
        UserError: there is no tokenizer, it cannot be loaded, or it has no vocabulary.
    """
    place, options = _locate(source)
    if isinstance(place, Path) and not any((place / name).is_file() for name in TOKENIZER_FILES):
        raise argument_error(
            "model", f"no tokenizer in {place}: found none of {', '.join(TOKENIZER_FILES)}"
        )
    with _quiet(), _loading(source, "tokenizer"):
        tokenizer = transformers().AutoTokenizer.from_pretrained(str(place), **options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise argument_error("model", f"the tokenizer in {place} has no vocabulary")
    return tokenizer


def load_config(source: ModelSource, vocabulary: int) -> Any:
    """Return the model's configuration with the overrides applied.

    Args:
        source: the model.
        vocabulary: number of tokens in the tokenizer's vocabulary; the default vocabulary size
            of a complete configuration.

    Raises:
        UserError: there is no configuration, a key is unknown, the model is an encoder-decoder, or
            there are fewer embeddings than tokens.
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
            raise argument_error(
                "model", f"no config.json in {place}; is it a transformers checkpoint?"
            )
        with _quiet(), _loading(source, "configuration"):
            config = library.AutoConfig.from_pretrained(str(place), **options, **changes)
    _check_config(config, changes, vocabulary)
    if source.dropout is not None:
        for key, value in config.to_dict().items():
            if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, int | float):
                setattr(config, key, source.dropout)
    return config


def _check_config(config: Any, changes: Mapping[str, Any], vocabulary: int) -> None:
    """Raise `UserError` for an unknown key, an encoder-decoder, or too few embeddings."""
    # A configuration accepts any key, so keys are checked against those of a default one.
    known = {*type(config)().to_dict(), *config.attribute_map}
    for key in changes:
        if key not in known:
            hint = nearest(key, known)
            hint = hint if "did you mean" in hint else ""
            raise argument_error(
                f"config.{key}", f"{config.model_type} models have no such key{hint}"
            )
    if config.is_encoder_decoder:
        raise argument_error(
            "model", f"{config.model_type} is an encoder-decoder; those are unsupported"
        )
    if config.vocab_size < vocabulary:
        raise argument_error(
            "model",
            f"it has {config.vocab_size} embeddings, but the tokenizer has {vocabulary} tokens",
        )


def load_model(source: ModelSource, factory: str, vocabulary: int) -> nn.Module:
    """Return the model in float32 and in training mode.

    Args:
        source: the model.
        factory: name of the transformers class that loads the model, such as `AutoModel`.
        vocabulary: number of tokens in the tokenizer's vocabulary.

    Returns:
        The model without its pooler.

    Raises:
        UserError: there is no such model, `factory` does not support it, or weights are missing,
            have a wrong shape or are not finite.
    """
    library = transformers()
    config = load_config(source, vocabulary)
    maker = getattr(library, factory)
    # Private, but transformers has no public list of the models that an auto class supports.
    if type(config) not in maker._model_mapping:
        raise argument_error("model", f"{factory} does not support {config.model_type} models")
    if source.train_from_scratch:
        with _quiet(), _loading(source, "model"):
            return _without_pooler(maker.from_config(config, dtype=torch.float32))
    place, options = _locate(source)
    if isinstance(place, Path) and not any(any(place.glob(name)) for name in WEIGHT_FILES):
        raise argument_error(
            "model", f"no weights in {place}; set train_from_scratch to start from random ones"
        )
    with _quiet(), _loading(source, "model"):
        # transformers would report files without read permission as missing.
        for file in place.iterdir() if isinstance(place, Path) else ():
            if file.is_file():
                file.open("rb").close()
        model, info = maker.from_pretrained(
            str(place),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by _check_weights
            **options,
        )
    _check_weights(source, model, info)
    return _without_pooler(model)


def _check_weights(source: ModelSource, model: nn.Module, info: Mapping[str, Any]) -> None:
    """Raise `UserError` if weights are missing, have a wrong shape, or contain NaN or infinity."""
    if wrong := sorted(info["mismatched_keys"]):
        key, found, expected = wrong[0]
        raise argument_error(
            "model",
            f"{source.model}: {key} has shape {tuple(found)} in the checkpoint and "
            f"{tuple(expected)} in the configuration; use the checkpoint's own configuration",
        )
    # Missing pooler weights are harmless, because the pooler is removed.
    missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)
    if missing:
        names = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise argument_error(
            "model",
            f"the checkpoint lacks {len(missing)} weights of {type(model).__name__}: {names}; "
            "use a checkpoint of that class, or set train_from_scratch",
        )
    for key, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise argument_error("model", f"{source.model}: weights are not finite: {key}")


def _without_pooler(model: nn.Module) -> nn.Module:
    """Remove the pooler, which no task uses, and switch to training mode."""
    if getattr(model, "pooler", None) is not None:
        model.register_module("pooler", None)
    return model.train()


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Return the mean squared error of the hidden states, relative to the teacher's variance.

    Args:
        student: the student's hidden states, each of shape (B, L, H); the first element, the
            embedding output, is ignored.
        teacher: the teacher's hidden states, in the same format.
        mask: (B, L), 1 for the tokens to include and 0 for all others.

    Returns:
        The mean over the layers, a scalar.
    """
    weight = mask.unsqueeze(-1).float()
    total = torch.zeros((), device=student[0].device)
    for actual, target in zip(student[1:], teacher[1:], strict=True):
        actual, target = actual.float(), target.float()
        count = weight.sum() * actual.shape[-1]
        mean = (target * weight).sum() / count
        variance = ((target - mean).square() * weight).sum() / count
        error = ((actual - target).square() * weight).sum() / count
        total = total + error / variance.clamp(min=1e-12)
    return total / max(1, len(student) - 1)


def _locate(source: ModelSource) -> tuple[Path | str, dict[str, Any]]:
    """Return the folder or hub name of a model, and the options for `from_pretrained`."""
    options: dict[str, Any] = {"trust_remote_code": False}
    place = resolve_path(source.model, "task_args.model")
    if place.is_dir():
        # Without this option, transformers queries the hub for some folders.
        return place, {**options, "local_files_only": True}
    name = source.model
    is_path = name.startswith((PREFIX, ".", "/", "~")) or name.count("/") > 1
    if is_path or place.exists():
        raise argument_error("model", f"no folder {place}")
    return name, options


@contextlib.contextmanager
def _loading(source: ModelSource, what: str) -> Iterator[None]:
    """Turn any exception raised by transformers into a one-line `UserError`."""
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise argument_error("model", unreadable(error)) from error
    except Exception as error:
        reason = one_line(error)
        kinds = (OSError, ConnectionError)
        if isinstance(error, kinds) and not resolve_path(source.model, "task_args.model").is_dir():
            raise argument_error(
                "model",
                f"'{source.model}' is not a local folder, and its {what} could not be downloaded "
                f"from the hub ({unreachable_reason() or reason}); name a folder, or download the "
                "model on a machine with network access",
            ) from error
        raise argument_error(
            "model", f"{source.model}: the {what} cannot be loaded: {reason}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars and log messages of transformers; errors are still raised.

    Also applies `hub_access`, so that only the cache is used if the hub is unreachable.
    """
    logging = transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with hub_access():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
