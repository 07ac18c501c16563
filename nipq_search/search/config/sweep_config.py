"""The sweep file: its sections, and one clear line for whatever is wrong in it."""

from __future__ import annotations

import contextlib
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
from nipq_search.search.config.budgets import check_budget
from nipq_search.search.config.plugins import check_installed, plugin_versions
from nipq_search.search.config.resources import LimitsSection, ResourcesSection, Section
from nipq_search.search.config.space import check_space
from nipq_search.search.config.yaml_loader import parse_yaml
from nipq_search.search.strategies.samplers import SAMPLERS
from nipq_search.search.strategies.strategies import STRATEGIES
from nipq_search.train import FloatConfig, TrainConfig

BudgetEntry = dict[str, float | int | str]


class SearchSection(Section):
    """What is searched, and how.

    Attributes:
        strategy: how budgets are assigned to trials.
        sampler: Optuna sampler that proposes hyperparameters.
        trials: trials in all, over every run of the sweep.
        space: hyperparameter to `{log: [a, b]}`, `{uniform: [a, b]}`, `{int: [a, b]}` or
            `{choice: [...]}`.
        bits: whether the sampler proposes a bit-width for every tensor too, as the profile that
            a trial starts from.
        front_cost: cost of the front; default the first budget's first.
        reference: metric from which the hypervolume counts; default 0.8 of the float model's.
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
        known[value]
        return value

    @field_validator("baselines")
    @classmethod
    def _baselines(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        for bits in value:
            if not 2 <= bits <= 16:
                raise ValueError(f"{bits} is no bit-width of a baseline; use 2 to 16")
        if len(set(value)) != len(value):
            raise ValueError("a bit-width stands twice")
        return value

    @field_validator("space", mode="before")
    @classmethod
    def _space(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            check_space(value)
        return value


class SweepConfig(Section):
    """A whole sweep: what `nipq-search run` reads from YAML.

    Attributes:
        name: identity of the sweep, together with the storage.
        seed: every other seed follows from it.
        task: a registered task or `package.module:Class`.
        task_args: keyword arguments of the task.
        float_model: where the float model comes from (`float` in files).
        quant: how models are quantized.
        budgets: cost to target, each entry one budget whose targets hold together.
        train: how trials are trained.
        search: what is searched.
        resources: what a trial gets.
        limits: when to stop.
        checkpoints: URI of a file system for models and checkpoints, such as `s3://BUCKET/FOLDER`;
            None keeps them in the sweep's folder.
        plugins: `package version` of every plug-in in use, by `<family>.<name>`. Written by `run`
            and no part of the sweep's identity.
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
            raise ValueError("a budget stands twice; remove one")
        return value

    @model_validator(mode="before")
    @classmethod
    def _plugins(cls, document: Any) -> Any:
        """Name the package of a missing plug-in before its name is reported as unknown."""
        wanted = document.get("plugins") if isinstance(document, dict) else None
        if isinstance(wanted, dict):
            check_installed(wanted)
        return document

    @model_validator(mode="before")
    @classmethod
    def _lambda(cls, document: Any) -> Any:
        """`lambda` is a word of Python's own, so the field has another name."""
        train = document.get("train") if isinstance(document, dict) else None
        if not isinstance(train, dict) or "lambda" not in train:
            return document
        renamed = {("lambda_" if key == "lambda" else key): v for key, v in train.items()}
        return {**document, "train": renamed}

    @model_validator(mode="after")
    def _one_start(self) -> SweepConfig:
        """Bit-widths cannot start in two places."""
        if self.search.bits and (self.train.start != "budget" or "start" in self.search.space):
            raise ValueError(
                "search.bits: trials start at the bit-widths that the sampler proposes; leave "
                "train.start at `budget` and out of search.space"
            )
        return self

    @property
    def needs_scores(self) -> bool:
        """Whether some trial may start from sensitivity scores."""
        choices = self.search.space.get("start", {}).get("choice", [])
        return "sensitivity" in (self.train.start, *choices)

    @property
    def front_cost(self) -> str:
        """Name of the cost of the front."""
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
        """Return the configuration with the packages and versions that are installed here.

        Raises:
            UserError: an entry is unknown, or several packages offer it.
        """
        return self.model_copy(update={"plugins": plugin_versions(self.entries)})

    def as_json(self) -> dict[str, Any]:
        """The resolved configuration as plain JSON types, spelled as in a sweep file."""
        document: dict[str, Any] = json.loads(self.model_dump_json(by_alias=True))
        document["train"]["lambda"] = document["train"].pop("lambda_")
        if not self.plugins:
            del document["plugins"]
        return document


def parse_config(document: Any, source: str = "sweep") -> SweepConfig:
    """A checked configuration from plain types.

    Args:
        document: what a sweep file holds.
        source: name of the file, for messages.

    Raises:
        UserError: one line naming the key and the fix.
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
    """Read and check a sweep file.

    Args:
        path: YAML file.
        overrides: `a.b=c`, the value in YAML; applied before checking.

    Raises:
        UserError: no such file, no YAML, or anything wrong in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    document = parse_yaml(text, str(path))
    if overrides and not isinstance(document, dict):
        return parse_config(document, str(path))  # which says what a sweep file is
    for override in overrides:
        _override(document, override)
    return parse_config(document, str(path))


def _override(document: Any, text: str) -> None:
    """Apply one `a.b=c`; the value is YAML."""
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
            raise UserError(f"--set {text}: {section} is no section")
        if index == len(parents):
            place[entry] = parsed
        elif isinstance(place, dict):
            place = place.setdefault(entry, {})
        else:
            place = place[entry]


def _fields_at(location: Sequence[Any]) -> list[str]:
    """Known keys of the section at a location, in the spelling of sweep files."""
    section: Any = SweepConfig
    for part in location:
        fields = _keys(section)
        if part not in fields:
            return []
        section = fields[part]
    return list(_keys(section))


def _keys(section: Any) -> dict[str, Any]:
    """Key to type of a section's fields."""
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
    """The first mistake as `key: what and how to mend it`; an unknown key before a missing one."""
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    first = min(error.errors(), key=lambda found: found["type"] not in unknown)
    location = tuple("lambda" if part == "lambda_" else part for part in first["loc"])
    # Unions put the tried type's name at the end of a location.
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
    # Configurations of the lower layers name their key themselves.
    if ": " in message and message.split(":")[0].split(".")[0] in SweepConfig.model_fields:
        return message
    if kind not in ("value_error",):
        message = f"{message}, got {first['input']!r}"
    return f"{key}: {message}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two documents differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {a!r} -> {b!r}")
    return found


def check_resume(old: Mapping[str, Any], new: SweepConfig) -> None:
    """Check that a configuration may continue a sweep that began with another.

    More budgets are fine, and any number of trials, resources, limits and versions of plug-ins.

    Raises:
        UserError: anything else differs; names it.
    """
    document = new.as_json()
    with contextlib.suppress(UserError):  # a key that is newer than the sweep has its default
        old = parse_config(dict(old)).as_json()
    lost = [entry for entry in old["budgets"] if entry not in document["budgets"]]
    if lost:
        raise UserError(
            f"budgets: {lost[0]} was part of this sweep and is missing now; budgets can only be "
            "added (or give the sweep another name)"
        )

    def fixed(config: Mapping[str, Any]) -> dict[str, Any]:
        changeable = ("budgets", "resources", "limits", "plugins")
        kept = {k: v for k, v in config.items() if k not in changeable}
        free = ("trials", "front_cost")  # the front's cost counts, however it is named: see below
        kept["search"] = {k: v for k, v in config["search"].items() if k not in free}
        return kept

    found = differences(fixed(old), fixed(document))
    old_cost = old["search"].get("front_cost") or next(iter(old["budgets"][0]))
    if old_cost != new.front_cost:
        found.append(f"front cost: {old_cost!r} -> {new.front_cost!r}; name search.front_cost")
    if found:
        raise UserError(
            f"the sweep '{new.name}' began with another configuration: {'; '.join(found)} "
            "(change it back, or give the sweep another name and --out)"
        )
