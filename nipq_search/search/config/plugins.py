"""Plug-ins of a sweep: the packages and versions that provide what its configuration names.

Entries are identified by `<family>.<name>`, for example `quantizer.nipq`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nipq_search.cost import COSTS
from nipq_search.errors import UserError
from nipq_search.quant import QUANTIZERS
from nipq_search.registry import Plugin, Registry
from nipq_search.search.strategies.samplers import SAMPLERS
from nipq_search.search.strategies.strategies import STRATEGIES
from nipq_search.tasks import TASKS

FAMILIES: Mapping[str, Registry[Any]] = {
    registry.kind: registry for registry in (QUANTIZERS, COSTS, TASKS, STRATEGIES, SAMPLERS)
}
"""Registries that other packages can extend, by the singular noun for their entries."""


def plugin_versions(entries: Iterable[str]) -> dict[str, str]:
    """Return package and version of each entry that a plug-in provides; own entries are left out.

    Raises:
        UserError: an entry is unknown, or several packages offer it.
    """
    found = {}
    for entry in entries:
        family, _, name = entry.partition(".")
        if (plugin := FAMILIES[family].plugin(name)) is not None:
            found[entry] = str(plugin)
    return found


def plugin_mismatches(wanted: Mapping[str, str]) -> list[str]:
    """Return one line, with its fix, per plug-in that is missing here or has another version.

    Args:
        wanted: `package version` by entry, as `plugin_versions` returns it.
    """
    found = []
    for entry, package in wanted.items():
        here = _installed(entry)
        if here != package:
            found.append(f"{_label(entry)} needs {package}, found {here}: {_install(package)}")
    return found


def check_installed(wanted: Mapping[str, str]) -> None:
    """Check that the plug-ins that a sweep was recorded with are installed, in any version.

    Raises:
        UserError: one is missing; names the package and how to install it.
    """
    for entry, package in wanted.items():
        family, _, name = entry.partition(".")
        if family in FAMILIES and name not in FAMILIES[family]:
            raise UserError(
                f"plugins: {_label(entry)} comes from {package}, which is not installed; run "
                f"{_install(package)}"
            )


def plugin_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return one line per entry whose package or version differs between two runs of a sweep."""
    return [
        f"{_label(entry)}: {package} before, {now[entry]} now"
        for entry, package in before.items()
        if now.get(entry, package) != package
    ]


def installed_plugins() -> Iterator[tuple[str, Plugin]]:
    """Yield every entry that an installed package offers, with its plug-in; imports none."""
    for family, registry in FAMILIES.items():
        for plugin in registry.plugins():
            yield f"{family}.{plugin.name}", plugin


def _installed(entry: str) -> str:
    """What provides an entry here."""
    family, _, name = entry.partition(".")
    try:
        return str(FAMILIES[family].plugin(name) or "nipq_search")
    except UserError:
        offers = [str(p) for p in FAMILIES[family].plugins() if p.name == name]
        return " and ".join(offers) or "none"


def _label(entry: str) -> str:
    family, _, name = entry.partition(".")
    return f"{family} '{name}'"


def _install(package: str) -> str:
    name, _, version = package.rpartition(" ")
    return f"python -m pip install {name}=={version}"
