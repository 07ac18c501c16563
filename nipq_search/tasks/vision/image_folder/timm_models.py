"""Queries to timm's model registry: names, input sizes, normalization and classifiers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from nipq_search.tasks.common.arguments import argument_error, non_empty_string
from nipq_search.tasks.common.extras import requires_extra


def import_timm() -> Any:
    """Return the module `timm`.

    Raises:
        UserError: timm is not installed.
    """
    with requires_extra("task image_folder", "vision"):
        import timm
    return timm


def check_name(name: str, key: str) -> None:
    """Raise `UserError` unless timm has a model with this name."""
    timm = import_timm()
    if not timm.is_model(non_empty_string(key, name)):
        close = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.4)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise argument_error(key, f"timm has no model named '{name}'{hint}")


def data_config(name: str) -> Mapping[str, Any]:
    """Return the entries of a model's pretrained configuration, such as `mean`; may be empty."""
    cfg = import_timm().get_pretrained_cfg(name)
    return cfg.to_dict() if cfg is not None else {}


def check_size(name: str | None, size: int) -> None:
    """Raise `UserError` if the model, when there is one, accepts only images of another size."""
    config = {} if name is None else data_config(name)
    fixed = config.get("input_size", (3, size, size))[-1]
    if config.get("fixed_input_size") and fixed != size:
        raise argument_error(
            "size", f"{name} accepts only images of {fixed} pixels; set size: {fixed}"
        )


def classifier_names(name: str) -> tuple[str, ...]:
    """Return the names of the modules that compute the logits."""
    names = data_config(name).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
