"""Starting weights of image models: timm's pretrained weights or a checkpoint file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nipq_search.errors import UserError, one_line
from nipq_search.tasks.base import unreadable
from nipq_search.tasks.common.arguments import argument_error, non_empty_string
from nipq_search.tasks.common.extras import requires_extra
from nipq_search.tasks.common.package_files import absolute_if_exists, resolve_file
from nipq_search.tasks.vision.image_folder.timm_models import classifier_names

PRETRAINED = "timm"
"""Value of `weights` that selects timm's pretrained weights."""

WRAPPERS = ("state_dict", "model")
"""Entries of a training checkpoint that may contain the state dict."""

_log = logging.getLogger("nipq_search")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Starting weights of a model.

    Attributes:
        name: None for random weights, `timm` for timm's pretrained weights, or a file.
        key: name of the argument that selects the weights, for messages.
        in_order: whether to match the file's entries to the model's by position, regardless of
            their names.
        new_classifier: whether to reinitialize a classifier that has a different number of
            classes; if False, such weights are rejected.
    """

    name: str | None
    key: str
    in_order: bool = False
    new_classifier: bool = True

    @property
    def pretrained(self) -> bool:
        """Whether these are timm's pretrained weights."""
        return self.name == PRETRAINED

    def check_classes(self, model: str, origin: str, found: int, classes: int) -> None:
        """If the numbers of classes differ, log that the classifier is reinitialized.

        Args:
            model: timm's name for the model.
            origin: where the weights come from, for messages.
            found: number of classes in the weights.
            classes: number of classes in the data.

        Raises:
            UserError: the numbers differ and `new_classifier` is False.
        """
        if found == classes:
            return
        problem = f"{model}: {origin} has {found} classes and the data have {classes}"
        if not self.new_classifier:
            raise argument_error(self.key, f"{problem}; a teacher needs the same number")
        _log.info("%s: new classifier", problem)

    def load(self, model: nn.Module, name: str, classes: int) -> None:
        """Load the weights in a file into a model; without a file, the model does not change.

        Args:
            model: the model, changed in place.
            name: timm's name for the model.
            classes: number of classes in the data. If the file's classifier has a different
                number, the model's classifier keeps its random weights.

        Raises:
            UserError: the file does not fit the model.
        """
        if self.name is None or self.pretrained:
            return
        path = resolve_file(self.name, f"task_args.{self.key}")
        state, own = read_state(path), model.state_dict()
        if bad := next((k for k, v in state.items() if not is_finite(v)), None):
            raise argument_error(self.key, f"{path}: weights are not finite: {bad}")
        if self.in_order:
            if len(state) != len(own):
                raise argument_error(
                    self.key,
                    f"{path} has {len(state)} entries and {name} has {len(own)}; weights_order "
                    "requires equal numbers",
                )
            state = dict(zip(own, state.values(), strict=True))
        self._check_keys(path, name, state, own)
        wrong = [key for key, value in state.items() if value.shape != own[key].shape]
        classifier = tuple(f"{module}." for module in classifier_names(name))
        if wrong and all(key.startswith(classifier) for key in wrong):
            self.check_classes(name, str(path), len(state[wrong[0]]), classes)
            state = {key: value for key, value in state.items() if key not in wrong}
        elif wrong:
            raise argument_error(
                self.key,
                f"{path} is not a checkpoint of {name}: {wrong[0]} has shape "
                f"{tuple(state[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}",
            )
        model.load_state_dict({**own, **state})

    def _check_keys(
        self, path: Path, name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> None:
        """Raise `UserError` unless the file has exactly the entries of the model."""
        # Old checkpoints lack these counters, and no result depends on them.
        missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
        unexpected = [key for key in state if key not in own]
        problems = [f"lacks {_first(missing)}"] if missing else []
        problems += [f"has {_first(unexpected)}, which the model lacks"] if unexpected else []
        if problems:
            raise argument_error(
                self.key, f"{path} is not a checkpoint of {name}: it {' and '.join(problems)}"
            )


def checked_weights(key: str, name: Any) -> str | None:
    """Return `name` as a value of `Weights.name`, with the path of a file made absolute."""
    if name is None or name == PRETRAINED:
        return name  # type: ignore[no-any-return]
    return str(absolute_if_exists(non_empty_string(key, name)))


def _first(keys: list[str]) -> str:
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    return ", ".join(keys[:2]) + more


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file written by `torch.save` or safetensors, without wrappers.

    Only tensors and plain containers are unpickled.

    Raises:
        UserError: the file is missing or has no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            with requires_extra("task image_folder", "vision"):
                from safetensors.torch import load_file
            state: Any = load_file(path)
        else:
            with warnings.catch_warnings():  # torch warns about some file suffixes
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(unreadable(error)) from error
    except Exception as error:  # each format raises its own exception types
        raise UserError(
            f"{path}: cannot be read as a weights file ({one_line(error, 120)})"
        ) from error
    for name in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: contains no state dict, a mapping of names to tensors")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def is_finite(value: Tensor) -> bool:
    """Whether a tensor contains neither NaN nor infinity."""
    return not value.is_floating_point() or bool(torch.isfinite(value).all())
