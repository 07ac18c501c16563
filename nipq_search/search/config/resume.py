"""The check that a resumed sweep changes only the settings that may change."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from nipq_search.errors import UserError
from nipq_search.search.config.sweep_config import SweepConfig, parse_config


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List every value in which two nested documents differ.

    Args:
        old: a nested mapping of plain types.
        new: the mapping to compare it with.
        prefix: prepended to the keys.

    Returns:
        One `key: old -> new` per difference.
    """
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
    """Check that a sweep may be resumed with a configuration that differs from its earlier one.

    Additional budgets, different versions of plug-ins, and changes to `search.trials`,
    `resources` and `limits` are allowed.

    Args:
        old: the configuration of the earlier run, as `SweepConfig.as_json` returned it.
        new: the configuration of this run.

    Raises:
        UserError: anything else differs; the message says what.
    """
    document = new.as_json()
    with contextlib.suppress(UserError):  # parsing adds defaults for keys introduced since then
        old = parse_config(dict(old)).as_json()
    lost = [entry for entry in old["budgets"] if entry not in document["budgets"]]
    if lost:
        raise UserError(
            f"budgets: {lost[0]} belongs to this sweep but is missing now; budgets can only be "
            "added (or give the sweep another name)"
        )

    def unchangeable(config: Mapping[str, Any]) -> dict[str, Any]:
        changeable = ("budgets", "resources", "limits", "plugins")
        kept = {k: v for k, v in config.items() if k not in changeable}
        # The effective front cost is compared below.
        changeable_in_search = ("trials", "front_cost")
        kept["search"] = {
            k: v for k, v in config["search"].items() if k not in changeable_in_search
        }
        return kept

    found = differences(unchangeable(old), unchangeable(document))
    old_cost = old["search"].get("front_cost") or next(iter(old["budgets"][0]))
    if old_cost != new.front_cost:
        found.append(f"front cost: {old_cost!r} -> {new.front_cost!r}; set search.front_cost")
    if found:
        raise UserError(
            f"the sweep '{new.name}' began with a different configuration: {'; '.join(found)} "
            "(change it back, or give the sweep another name and --out)"
        )
