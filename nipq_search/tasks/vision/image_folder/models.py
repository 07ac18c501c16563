"""The argument sections that describe the model and its teacher, and how both are built."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nipq_search.errors import one_line
from nipq_search.tasks.common.arguments import argument_error, flag, number
from nipq_search.tasks.common.hub import hub_access, unreachable_reason
from nipq_search.tasks.common.sections import store
from nipq_search.tasks.vision.image_folder.timm_models import (
    check_name,
    data_config,
    import_timm,
)
from nipq_search.tasks.vision.image_folder.transforms import ChannelNormalization
from nipq_search.tasks.vision.image_folder.weights import PRETRAINED, Weights, checked_weights


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """A timm model and its starting weights.

    Attributes:
        model: timm's name for the model.
        weights: None for random weights, `timm` for timm's pretrained weights, a file, or
            `package://NAME/FILE`.
        weights_order: whether to match the file's entries to the model's by position, regardless
            of their names.
        drop_rate: dropout probability before the classifier.
        drop_path_rate: maximum drop probability of stochastic depth.
        norm_momentum: weight of the current batch in the running statistics of batch
            normalization; None keeps the model's own value.
        channels_last: whether to use the channels-last memory layout, which is faster on GPUs.
    """

    model: str
    weights: str | None = None
    weights_order: bool = False
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    norm_momentum: float | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        """Check every argument and make the path of a weights file absolute."""
        check_name(self.model, "model")
        flag("weights_order", self.weights_order)
        flag("channels_last", self.channels_last)
        if self.norm_momentum is not None:
            number("norm_momentum", self.norm_momentum, 1e-6, 1)
        store(
            self,
            weights=checked_weights("weights", self.weights),
            drop_rate=number("drop_rate", self.drop_rate, 0, 0.999),
            drop_path_rate=number("drop_path_rate", self.drop_path_rate, 0, 0.999),
        )

    def build(self, classes: int) -> nn.Module:
        """Return a new model for a number of classes.

        Random weights are drawn from torch's default generator.

        Raises:
            UserError: timm cannot build the model, or the weights do not fit it.
        """
        rates = {"drop_rate": self.drop_rate, "drop_path_rate": self.drop_path_rate}
        weights = Weights(name=self.weights, key="weights", in_order=self.weights_order)
        options = {key: rate for key, rate in rates.items() if rate}
        model = create_model(self.model, classes, weights, **options)
        for module in model.modules() if self.norm_momentum is not None else ():
            # Private, but torch has no public base class for all batch normalization layers.
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = self.norm_momentum
        return self.lay_out(model)

    def lay_out(self, model: nn.Module) -> nn.Module:
        """Return the given model with its parameters in the memory layout of this model."""
        if not self.channels_last:
            return model
        return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True, kw_only=True)
class ImageTeacher:
    """A trained timm model that replaces the float model as the teacher.

    Attributes:
        teacher: timm's name for the model; None uses the float model as the teacher.
        teacher_weights: the teacher's weights, in the format of `ImageModel.weights`.
    """

    teacher: str | None = None
    teacher_weights: str | None = PRETRAINED

    def __post_init__(self) -> None:
        """Check every argument and make the path of a weights file absolute."""
        if self.teacher is not None:
            check_name(self.teacher, "teacher")
            store(self, teacher_weights=checked_weights("teacher_weights", self.teacher_weights))

    def build(self, classes: int) -> nn.Module | None:
        """Return the teacher for a number of classes, or None if there is none.

        Raises:
            UserError: timm cannot build the model, or the weights do not fit it.
        """
        if self.teacher is None:
            return None
        weights = Weights(name=self.teacher_weights, key="teacher_weights", new_classifier=False)
        return create_model(self.teacher, classes, weights)


def create_model(name: str, classes: int, weights: Weights, **options: Any) -> nn.Module:
    """Build a timm model and load its weights.

    Args:
        name: timm's name for the model.
        classes: number of outputs.
        weights: starting weights.
        options: further arguments of `timm.create_model`.

    Returns:
        The model. Parameters that are not loaded are drawn from torch's default generator.

    Raises:
        UserError: timm cannot build the model or download its weights, or a file does not fit.
    """
    timm = import_timm()
    try:
        with hub_access() if weights.pretrained else contextlib.nullcontext():
            model: nn.Module = timm.create_model(
                name, pretrained=weights.pretrained, num_classes=classes, **options
            )
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        if not weights.pretrained:
            raise argument_error("model", f"{name}: {reason}") from error
        remote = type(error).__module__.startswith(("huggingface_hub", "httpx", "requests"))
        reason = (unreachable_reason() if remote else "") or reason
        raise argument_error(
            weights.key,
            f"no pretrained weights of {name} from timm ({reason}); download them on a machine "
            "with network access, or name a file",
        ) from error
    if weights.pretrained:
        known = data_config(name).get("num_classes", classes)
        weights.check_classes(name, "timm", known, classes)
    weights.load(model, name, classes)
    return model


class Teacher(nn.Module):
    """A model that accepts inputs normalized for a different model."""

    def __init__(
        self, model: nn.Module, own: ChannelNormalization, given: ChannelNormalization
    ) -> None:
        """Wrap a model.

        Args:
            model: the model.
            own: the normalization with which the model was trained.
            given: the normalization of the inputs that `forward` receives.
        """
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
        """Map images (B, 3, H, W), with the normalization `given`, to logits (B, classes)."""
        logits: Tensor = self.model(x * self.scale + self.shift)
        return logits
