"""Image models of timm: built by name, with weights from a file, from timm, or none."""

from __future__ import annotations

import contextlib
import difflib
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
from nipq_search.tasks.common.arguments import refuse, text
from nipq_search.tasks.common.hub import hub, silent
from nipq_search.tasks.common.package_files import anchored, needed, resolve_file
from nipq_search.tasks.vision.image_folder.transforms import ChannelNormalization

PRETRAINED = "timm"
"""Value of `weights` that asks timm for its own."""

WRAPPERS = ("state_dict", "model")
"""Entries of a training checkpoint in which its state dict may be."""

_log = logging.getLogger("nipq_search")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """An image model.

    Attributes:
        name: timm's name of it.
        weights: None for a random start, `timm`, or a file.
        weights_order: the file's entries are the model's in order, whatever their names.
        classes: outputs.
        key: the sweep file's key of the weights, for messages.
        drop_rate: dropout before the classifier.
        drop_path_rate: greatest stochastic depth.
        norm_momentum: share of a batch in running statistics; None keeps the model's.
        new_classifier: whether weights for another number of classes may be used without theirs.
    """

    name: str
    weights: str | None
    classes: int
    key: str = "weights"
    weights_order: bool = False
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    norm_momentum: float | None = None
    new_classifier: bool = True

    def __post_init__(self) -> None:
        """Make a file's name absolute."""
        if self.weights != PRETRAINED:
            object.__setattr__(self, "weights", anchored(self.weights))

    def build(self) -> nn.Module:
        """The model with its weights; what stays random comes from torch's default generator."""
        timm = import_timm()
        options: dict[str, Any] = {"drop_rate": self.drop_rate} if self.drop_rate else {}
        if self.drop_path_rate:
            options["drop_path_rate"] = self.drop_path_rate
        pretrained = self.weights == PRETRAINED
        try:
            with hub() if pretrained else contextlib.nullcontext():
                model: nn.Module = timm.create_model(
                    self.name, pretrained=pretrained, num_classes=self.classes, **options
                )
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            if not pretrained:
                raise refuse("model", f"{self.name}: {reason}") from error
            asked = type(error).__module__.startswith(("huggingface_hub", "httpx", "requests"))
            why = (silent() if asked else "") or reason
            raise refuse(
                self.key,
                f"timm has no weights of {self.name} to give ({why}); download "
                "them where there is a network, or name a file",
            ) from error
        if pretrained:
            self._check_classes("timm", data_config(self.name).get("num_classes", self.classes))
        if self.weights is not None and not pretrained:
            self._load(model, self.weights)
        for module in model.modules() if self.norm_momentum is not None else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = self.norm_momentum
        return model

    def _check_classes(self, place: str, known: int) -> None:
        """Say that the classifier is new where the weights know another number of classes."""
        if known == self.classes:
            return
        said = f"{self.name}: {place} has {known} classes and the data {self.classes}"
        if not self.new_classifier:
            raise UserError(f"task_args.{self.key}: {said}; a teacher needs the same")
        _log.info("%s: new classifier", said)

    def _load(self, model: nn.Module, weights: str) -> None:
        """Copy the file's weights into the model; the classifier only where classes are equal."""
        path = resolve_file(weights, f"task_args.{self.key}")
        state, own = read_state(path), model.state_dict()
        if bad := next((k for k, v in state.items() if not is_finite(v)), None):
            raise refuse(self.key, f"{path}: weights are not finite: {bad}")
        if self.weights_order:
            if len(state) != len(own):
                raise UserError(
                    f"task_args.{self.key}: {path} has {len(state)} entries and {self.name} "
                    f"{len(own)}; weights_order needs as many"
                )
            state = dict(zip(own, state.values(), strict=True))
        # Old checkpoints do not count batches; nothing depends on that.
        missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
        unexpected = [key for key in state if key not in own]
        if missing or unexpected:
            said = [f"lacks {_first(missing)}"] if missing else []
            said += [f"has {_first(unexpected)}, unknown to the model"] if unexpected else []
            raise UserError(
                f"task_args.{self.key}: {path} is no checkpoint of {self.name}: it "
                + " and ".join(said)
            )
        wrong = [key for key, value in state.items() if value.shape != own[key].shape]
        classifier = tuple(f"{name}." for name in classifier_names(self.name))
        if wrong and all(key.startswith(classifier) for key in wrong):
            self._check_classes(str(path), len(state[wrong[0]]))
            state = {key: value for key, value in state.items() if key not in wrong}
        elif wrong:
            raise UserError(
                f"task_args.{self.key}: {path} is no checkpoint of {self.name}: {wrong[0]} has "
                f"shape {tuple(state[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}"
            )
        model.load_state_dict({**own, **state})


def _first(keys: list[str]) -> str:
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    return ", ".join(keys[:2]) + more


def import_timm() -> Any:
    """The library; `UserError` says how to install it."""
    with needed("task image_folder", "vision"):
        import timm
    return timm


def check_name(name: str, key: str) -> None:
    """Raise `UserError` unless timm has a model of this name."""
    timm = import_timm()
    if not timm.is_model(text(key, name)):
        close = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.4)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise UserError(f"task_args.{key}: timm has no model named '{name}'{hint}")


def data_config(name: str) -> Mapping[str, Any]:
    """What timm knows of a model's inputs: `mean`, `std`, `interpolation`, `crop_pct`, ..."""
    cfg = import_timm().get_pretrained_cfg(name)
    return cfg.to_dict() if cfg is not None else {}


def check_size(name: str | None, size: int) -> None:
    """Raise `UserError` for a model that takes images of another size alone."""
    known = {} if name is None else data_config(name)
    fixed = known.get("input_size", (3, size, size))[-1]
    if known.get("fixed_input_size") and fixed != size:
        raise refuse("size", f"{name} takes images of {fixed} pixels alone; write size: {fixed}")


def classifier_names(name: str) -> tuple[str, ...]:
    """Names of the modules that give the logits."""
    names = data_config(name).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save` or of safetensors, as a model without wrappers.

    Raises:
        UserError: the file is missing or holds none. Nothing but tensors is unpickled.
    """
    try:
        if path.suffix == ".safetensors":
            with needed("task image_folder", "vision"):
                from safetensors.torch import load_file
            state: Any = load_file(path)
        else:
            with warnings.catch_warnings():  # torch's, about some suffixes
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(unreadable(error)) from error
    except Exception as error:  # every format has errors of its own
        raise UserError(f"{path}: no readable file of weights ({one_line(error, 120)})") from error
    for name in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: holds no state dict, a mapping of names to tensors")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def is_finite(value: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity."""
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


class Teacher(nn.Module):
    """A model with a normalization of its own, for inputs that were normalized for another."""

    def __init__(
        self, model: nn.Module, own: ChannelNormalization, given: ChannelNormalization
    ) -> None:
        """Take `model`, which wants `own` inputs and will get `given` ones."""
        super().__init__()
        self.model = model
        pairs = list(zip(given.mean, given.std, own.mean, own.std, strict=True))
        scale = torch.tensor([s / own_s for _, s, _, own_s in pairs])
        shift = torch.tensor([(m - own_m) / own_s for m, _, own_m, own_s in pairs])
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (B, 3, H, W) that were normalized for the other model."""
        logits: Tensor = self.model(x * self.scale + self.shift)
        return logits
