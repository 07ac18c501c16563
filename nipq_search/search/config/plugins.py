"""Plug-ins of a sweep: entries of its configuration that other packages provide.

Entries are identified by `<family>.<name>`, for example `quantizer.nipq`, and the packages that
provide them by `<package> <version>`.
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
"""Registries that other packages can extend, by the kind of their entries, such as `sampler`."""


def plugin_versions(entries: Iterable[str]) -> dict[str, str]:
    """Return `package version` by entry, for the entries that are not built in.

    Raises:
        UserError: an entry is unknown, or several packages provide it.
    """
    found = {}
    for entry in entries:
        family, _, name = entry.partition(".")
        if (plugin := FAMILIES[family].plugin(name)) is not None:
            found[entry] = str(plugin)
    return found


def plugin_mismatches(wanted: Mapping[str, str]) -> list[str]:
    """Return one line, with the fix, per package that is missing or has a different version here.

    Args:
        wanted: `package version` by entry, as `plugin_versions` returns it.
    """
    return [
        f"{labels} needs {package}, found {here}: {_install_command(package)}"
        for package, here, labels in _changed(wanted, {e: _installed(e) for e in wanted})
    ]


def check_installed(wanted: Mapping[Any, Any]) -> None:
    """Check that the plug-ins recorded for a sweep are installed, in any version.

    Args:
        wanted: the `plugins` section of a sweep file, possibly with entries of invalid types.

    Raises:
        UserError: a plug-in is missing; the message says how to install its package.
    """
    for entry, package in wanted.items():
        family, _, name = str(entry).partition(".")
        if family in FAMILIES and name not in FAMILIES[family]:
            raise UserError(
                f"plugins: {_label(str(entry))} comes from {package}, which is not installed; run "
                f"{_install_command(str(package))}"
            )


def plugin_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return one line per change of a package or its version between two runs of a sweep.

    Entries that only one of the runs used are omitted. Both arguments have the form that
    `plugin_versions` returns.
    """
    return [f"{old} -> {new} ({labels})" for old, new, labels in _changed(before, now)]


def installed_plugins() -> Iterator[tuple[str, Plugin]]:
    """Yield `FAMILY.NAME` and the description of every installed plug-in, without importing it."""
    for family, registry in FAMILIES.items():
        for plugin in registry.plugins():
            yield f"{family}.{plugin.name}", plugin


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield the old package, the new package and the labels of their entries, per change."""
    entries: dict[tuple[str, str], list[str]] = {}
    for entry in before.keys() & now.keys():
        if before[entry] != now[entry]:
            entries.setdefault((before[entry], now[entry]), []).append(_label(entry))
    for (old, new), labels in sorted(entries.items()):
        yield old, new, ", ".join(sorted(labels))


def _installed(entry: str) -> str:
    """Return text that names the installed packages that provide an entry, or "none"."""
    family, _, name = entry.partition(".")
    try:
        return str(FAMILIES[family].plugin(name) or "nipq_search")
    except UserError:
        offers = [str(p) for p in FAMILIES[family].plugins() if p.name == name]
        return " and ".join(offers) or "none"


def _label(entry: str) -> str:
    family, _, name = entry.partition(".")
    return f"{family} '{name}'"


def _install_command(package: str) -> str:
    name, _, version = package.rpartition(" ")
    return f"python -m pip install {name}=={version}"
