"""The sweep file: its sections, and its loader, which reports an invalid entry in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nipq_search.blobs import check_home
from nipq_search.errors import UserError, nearest
from nipq_search.quant import QuantConfig
from nipq_search.registry import Registry
from nipq_search.search.config.budgets import BudgetEntry, check_budget
from nipq_search.search.config.plugins import check_installed, plugin_versions
from nipq_search.search.config.resources import LimitsSection, ResourcesSection, Section
from nipq_search.search.config.space import check_space
from nipq_search.search.config.yaml_loader import parse_yaml
from nipq_search.search.strategies.samplers import SAMPLERS
from nipq_search.search.strategies.strategies import STRATEGIES
from nipq_search.train import FloatConfig, TrainConfig


class SearchSection(Section):
    """The search space and the search algorithm.

    Attributes:
        strategy: name of the strategy that assigns budgets and parents to trials.
        sampler: name of the Optuna sampler that proposes hyperparameters.
        trials: total number of trials over all runs of the sweep.
        space: range or choices by hyperparameter: `{log: [a, b]}`, `{uniform: [a, b]}`,
            `{int: [a, b]}` or `{choice: [...]}`.
        bits: whether the sampler also proposes the bit-widths with which a trial starts.
        front_cost: name of the Pareto front's cost; by default, the first cost of the first
            budget.
        reference: metric value of the hypervolume's reference point; by default, 0.8 times the
            metric of the float model, or 1.25 times if the metric is minimized; see
            `default_reference` for negative metrics.
        baselines: bit-widths of the uniform LSQ models that are trained for comparison.
    """

    strategy: str = "fill"
    sampler: str = "tpe"
    trials: int = Field(default=20, ge=1)
    space: dict[str, dict[str, list[Any]]] = Field(default_factory=dict)
    bits: bool = False
    front_cost: str | None = None
    reference: float | None = None
    baselines: tuple[int, ...] = (8, 4)

    @field_validator("strategy", "sampler")
    @classmethod
    def _registered(cls, value: str, info: ValidationInfo) -> str:
        known: Registry[Any] = STRATEGIES if info.field_name == "strategy" else SAMPLERS
        known[value]  # raises an error for an unknown name
        return value

    @field_validator("baselines")
    @classmethod
    def _baselines(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        for bits in value:
            if not 2 <= bits <= 16:
                raise ValueError(f"{bits} is not a valid baseline bit-width; use 2 to 16")
        if len(set(value)) != len(value):
            raise ValueError("duplicate bit-width; list each one once")
        return value

    @field_validator("space", mode="before")
    @classmethod
    def _space(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            check_space(value)
        return value


class SweepConfig(Section):
    """Configuration of a sweep, as read by `nipq-search run` from a YAML file.

    Attributes:
        name: name of the sweep; identifies it within the study storage.
        seed: root seed from which all other seeds are derived.
        task: a registered task or `package.module:Class`.
        task_args: keyword arguments of the task.
        float_model: source of the float model (`float` in sweep files).
        quant: quantization settings.
        budgets: each one maps cost names to targets; a trial must satisfy all targets of its
            budget.
        train: training settings.
        search: search space and search algorithm.
        resources: resources of one trial.
        limits: limits on time, training samples and failures.
        checkpoints: URI of the folder that stores models and checkpoints, such as
            `s3://BUCKET/FOLDER`; None stores them in the sweep's folder.
        plugins: `package version` of every plug-in in use, by `<family>.<name>`. `run` writes it;
            it is not part of the sweep's identity.

    Example:
        >>> from nipq_search import SweepConfig
        >>> config = SweepConfig(
        ...     name="demo",
        ...     task="digits",
        ...     budgets=[{"bops": "uniform 4"}, {"bops": "25 %", "weight_bytes": 24_000}],
        ...     search={"trials": 8, "space": {"lr": {"log": [0.01, 0.1]}}},
        ... )
        >>> config.front_cost
        'bops'
        >>> config.as_json()["search"]["trials"]
        8
    """

    name: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][\w.\- ]*$")
    seed: int = 0
    task: str
    task_args: dict[str, Any] = Field(default_factory=dict)
    float_model: FloatConfig = Field(default_factory=FloatConfig, alias="float")
    quant: QuantConfig = Field(default_factory=QuantConfig)
    budgets: list[BudgetEntry] = Field(min_length=1)
    train: TrainConfig = Field(default_factory=TrainConfig)
    search: SearchSection = Field(default_factory=SearchSection)
    resources: ResourcesSection = Field(default_factory=ResourcesSection)
    limits: LimitsSection = Field(default_factory=LimitsSection)
    checkpoints: str | None = None
    plugins: dict[str, str] = Field(default_factory=dict)

    @field_validator("checkpoints")
    @classmethod
    def _checkpoints(cls, value: str | None) -> str | None:
        if value is not None:
            check_home(value)
        return value

    @field_validator("budgets")
    @classmethod
    def _budgets(cls, value: list[BudgetEntry]) -> list[BudgetEntry]:
        for entry in value:
            check_budget(entry)
        if len({json.dumps(entry, sort_keys=True) for entry in value}) != len(value):
            raise ValueError("duplicate budget; remove one")
        return value

    @model_validator(mode="before")
    @classmethod
    def _plugins(cls, document: Any) -> Any:
        """Report a missing plug-in with its package, before its name is reported as unknown."""
        wanted = document.get("plugins") if isinstance(document, dict) else None
        if isinstance(wanted, dict):
            check_installed(wanted)
        return document

    @model_validator(mode="before")
    @classmethod
    def _lambda(cls, document: Any) -> Any:
        """Rename `lambda`, a reserved word in Python, to the name of the field."""
        train = document.get("train") if isinstance(document, dict) else None
        if not isinstance(train, dict) or "lambda" not in train:
            return document
        renamed = {("lambda_" if key == "lambda" else key): v for key, v in train.items()}
        return {**document, "train": renamed}

    @model_validator(mode="after")
    def _one_start(self) -> SweepConfig:
        """Reject a second source of initial bit-widths besides `search.bits`."""
        if self.search.bits and (self.train.start != "budget" or "start" in self.search.space):
            raise ValueError(
                "search.bits: trials start at the bit-widths that the sampler proposes; leave "
                "train.start at `budget` and remove `start` from search.space"
            )
        return self

    @property
    def needs_scores(self) -> bool:
        """Whether any trial may start from sensitivity scores."""
        choices = self.search.space.get("start", {}).get("choice", [])
        return "sensitivity" in (self.train.start, *choices)

    @property
    def front_cost(self) -> str:
        """Name of the Pareto front's cost."""
        return self.search.front_cost or next(iter(self.budgets[0]))

    @property
    def entries(self) -> tuple[str, ...]:
        """Registry entries that the sweep uses, as `<family>.<name>`."""
        costs = dict.fromkeys(
            [self.front_cost, *(cost for entry in self.budgets for cost in entry)]
        )
        return (
            f"quantizer.{self.quant.quantizer}",
            *(f"cost.{name}" for name in costs),
            *([] if ":" in self.task else [f"task.{self.task}"]),
            f"strategy.{self.search.strategy}",
            f"sampler.{self.search.sampler}",
        )

    def with_plugins(self) -> SweepConfig:
        """Return a copy in which `plugins` lists the plug-ins in use, as they are installed here.

        Raises:
            UserError: an entry is unknown, or several packages provide it.
        """
        return self.model_copy(update={"plugins": plugin_versions(self.entries)})

    def as_json(self) -> dict[str, Any]:
        """Return the configuration with all defaults as JSON types, keyed as in a sweep file.

        Without plug-ins, the key `plugins` is omitted.
        """
        document: dict[str, Any] = json.loads(self.model_dump_json(by_alias=True))
        document["train"]["lambda"] = document["train"].pop("lambda_")
        if not self.plugins:
            del document["plugins"]
        return document


def parse_config(document: Any, source: str = "sweep") -> SweepConfig:
    """Build a validated configuration from plain types.

    Args:
        document: content of a sweep file.
        source: name of the file, for error messages.

    Raises:
        UserError: the document is invalid; the message names the key and the fix.
    """
    if not isinstance(document, dict):
        raise UserError(f"{source}: a sweep file is a mapping of keys such as name, task, budgets")
    try:
        config = SweepConfig.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{source}: {_one_line(error)}") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    from nipq_search.cost.base import get_cost

    if config.search.front_cost:
        try:
            get_cost(config.search.front_cost)
        except UserError as error:
            raise UserError(f"{source}: search.front_cost: {error}") from error
    return config


def load_config(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read and validate a sweep file.

    Args:
        path: YAML file.
        overrides: assignments `a.b=c` with the value in YAML, applied before validation.

    Raises:
        UserError: the file cannot be read, is not YAML, or is invalid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    document = parse_yaml(text, str(path))
    if overrides and not isinstance(document, dict):
        return parse_config(document, str(path))  # raises the error for non-mappings
    for override in overrides:
        _override(document, override)
    return parse_config(document, str(path))


def _override(document: Any, text: str) -> None:
    """Apply one assignment `a.b=c`, whose value is YAML, to a document in place.

    Raises:
        UserError: the assignment is malformed, or its key does not exist and cannot be added.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"--set {text}: write KEY=VALUE, such as search.trials=8")
    try:
        parsed = parse_yaml(value, "value")
    except UserError as error:
        raise UserError(f"--set {text}: the value is not valid YAML") from error
    *parents, last = key.split(".")
    place = document
    for index, name in enumerate([*parents, last]):
        if isinstance(place, list) and name.isdigit() and int(name) < len(place):
            entry: Any = int(name)
        elif isinstance(place, dict):
            entry = name
        else:
            section = ".".join(parents[:index])
            if isinstance(place, list):
                raise UserError(f"--set {text}: {section} has entries 0 to {len(place) - 1}")
            raise UserError(f"--set {text}: {section} is not a section")
        if index == len(parents):
            place[entry] = parsed
        elif isinstance(place, dict):
            place = place.setdefault(entry, {})
        else:
            place = place[entry]


def _fields_at(location: Sequence[Any]) -> list[str]:
    """Return the valid keys of the section at a location, as spelled in sweep files.

    The result is empty if there is no section at the location.
    """
    section: Any = SweepConfig
    for part in location:
        fields = _keys(section)
        if part not in fields:
            return []
        section = fields[part]
    return list(_keys(section))


def _keys(section: Any) -> dict[str, Any]:
    """Return the type of each key of a section, by key as spelled in sweep files."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {(f.alias or n): f.annotation for n, f in section.model_fields.items()}
    import dataclasses
    import typing

    if dataclasses.is_dataclass(section) and isinstance(section, type):
        hints = typing.get_type_hints(section)
        return {
            ("lambda" if f.name == "lambda_" else f.name): hints[f.name]
            for f in dataclasses.fields(section)
        }
    return {name: None for name in get_args(section) if isinstance(name, str)}


def _one_line(error: ValidationError) -> str:
    """Format the first error as `key: problem and fix`; errors for unknown keys come first."""
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    first = min(error.errors(), key=lambda found: found["type"] not in unknown)
    location = tuple("lambda" if part == "lambda_" else part for part in first["loc"])
    # Pydantic appends the attempted member type of a union to the location.
    location = tuple(p for p in location if p not in ("int", "float", "str") or p == location[0])
    key = ".".join(str(part) for part in location)
    kind = first["type"]
    if kind in unknown:
        return f"{key}: unknown key{nearest(str(location[-1]), _fields_at(location[:-1]))}"
    if kind == "missing":
        return f"{key}: this key is missing"
    message = first["msg"]
    for prefix in ("Value error, ", "Assertion failed, "):
        message = message.removeprefix(prefix)
    # Messages from the configurations of lower layers already start with their key.
    if ": " in message and message.split(":")[0].split(".")[0] in SweepConfig.model_fields:
        return message
    if kind not in ("value_error",):
        message = f"{message}, got {first['input']!r}"
    return f"{key}: {message}"
