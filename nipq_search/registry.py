"""Registries of the values that configurations select by name: built-in entries and plug-ins.

Each family (quantizers, costs, tasks, strategies, samplers) has one `Registry`. Other packages
add entries through Python entry points in the registry's group. A plug-in is imported only
when its name is looked up, so a broken plug-in affects only configurations that select it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from nipq_search.errors import UserError, nearest, one_line

T = TypeVar("T")


class RegistrationError(ValueError):
    """The name is already registered, or the value did not pass the registry's check."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """An entry that an installed package provides through an entry point.

    Attributes:
        name: the name that configurations use.
        package: name of the distribution, as pip shows it.
        version: version of the distribution.
        target: the object to which the entry point refers, as `module:attribute`.
    """

    name: str
    package: str
    version: str
    target: str

    def __str__(self) -> str:
        """Return the package and its version."""
        return f"{self.package} {self.version}"


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to the values of one family.

    Built-in entries are registered explicitly and take precedence over plug-ins. Iteration yields
    the built-in entries and the plug-ins that have been looked up; `in` and `names` also cover
    installed plug-ins that have not been looked up.

    Args:
        kind: singular noun for the entries, used in messages.
        group: entry point group of the family; None if other packages cannot add entries.
        check: called with a name and a value; returns a message if the value is invalid, or None.
        hint: text appended to the message for an unknown name.
    """

    def __init__(
        self,
        kind: str,
        *,
        group: str | None = None,
        check: Callable[[str, Any], str | None] = lambda name, value: None,
        hint: str = "",
    ) -> None:
        """Create an empty registry."""
        self.kind, self.group = kind, group
        self._check, self._hint = check, hint
        self._own: dict[str, T] = {}
        self._loaded: dict[str, T] = {}

    def register(self, name: str, value: T) -> None:
        """Add a built-in entry.

        Raises:
            RegistrationError: the name is already registered, or the value did not pass the
                registry's check.
        """
        if name in self._own:
            raise RegistrationError(f"{self.kind} '{name}' is already registered")
        if problem := self._check(name, value):
            raise RegistrationError(f"{self.kind} '{name}': {problem}")
        self._own[name] = value

    @contextlib.contextmanager
    def temporarily(self, name: str, value: T) -> Iterator[None]:
        """Register or replace a built-in entry for the duration of a `with` block, for tests."""
        before = dict(self._own)
        self._own.pop(name, None)
        try:
            self.register(name, value)
            yield
        finally:
            self._own = before

    def __getitem__(self, name: str) -> T:
        """Return the value; if it is not built in, import the plug-in that provides it.

        Raises:
            UserError: the name is unknown, several packages provide it, or the plug-in is broken.
        """
        if name in self._own:
            return self._own[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def lookup(self, name: str, key: str) -> T:
        """Return the value, as indexing does; error messages begin with the configuration key.

        Args:
            name: the name of the entry.
            key: the configuration key that selects the entry, such as `quant.quantizer`.

        Raises:
            UserError: the name is unknown, several packages provide it, or the plug-in is broken.
        """
        try:
            return self[name]
        except UserError as error:
            raise UserError(f"{key}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the built-in entries and of the plug-ins looked up so far."""
        return iter([*self._own, *(name for name in self._loaded if name not in self._own)])

    def __len__(self) -> int:
        """Return the number of entries that iteration yields."""
        return len(self._own.keys() | self._loaded.keys())

    def __contains__(self, name: object) -> bool:
        """Return whether the name is built in or provided by a package; imports nothing."""
        if name in self._own or name in self._loaded:
            return True
        return isinstance(name, str) and bool(self._offers(name))

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value, or the default for an unknown name."""
        return self[name] if name in self else default

    def names(self) -> list[str]:
        """Return every name that can be looked up, sorted; imports nothing."""
        return sorted({*self, *(plugin.name for plugin in self.plugins())})

    def plugins(self) -> list[Plugin]:
        """Return all plug-ins of the installed packages, usable or not; imports nothing."""
        return [_plugin(entry) for entry in self._entries()]

    def plugin(self, name: str) -> Plugin | None:
        """Return the plug-in that a name selects, or None for a built-in entry; imports nothing.

        Raises:
            UserError: the name is unknown, or several packages provide it.
        """
        return None if name in self._own else _plugin(self._offer(name))

    def clashes(self) -> list[str]:
        """Return one line per plug-in name that a built-in entry or another package also uses."""
        found = []
        offered = self.plugins()
        for name in sorted({plugin.name for plugin in offered}):
            packages = [str(plugin) for plugin in offered if plugin.name == name]
            if name in self._own:
                found.append(
                    f"{self.kind} '{name}' of {' and '.join(packages)} is ignored: nipq_search "
                    "has its own"
                )
            elif len(packages) > 1:
                found.append(f"{self.kind} '{name}' is provided by {' and '.join(packages)}")
        return found

    def _entries(self) -> list[importlib.metadata.EntryPoint]:
        if self.group is None:
            return []
        return sorted(importlib.metadata.entry_points(group=self.group))

    def _offers(self, name: str) -> list[importlib.metadata.EntryPoint]:
        return [entry for entry in self._entries() if entry.name == name]

    def _offer(self, name: str) -> importlib.metadata.EntryPoint:
        """Return the entry point with this name; raise `UserError` unless there is exactly one."""
        offers = self._offers(name)
        if not offers:
            close = nearest(str(name), self.names())
            raise UserError(f"unknown {self.kind} '{name}'{close}{self._hint}")
        if len(offers) > 1:
            packages = " and ".join(str(_plugin(entry)) for entry in offers)
            raise UserError(
                f"{self.kind} '{name}' is provided by {packages}; uninstall all but one of them"
            )
        return offers[0]

    def _load(self, name: str) -> T:
        entry = self._offer(name)
        plugin = _plugin(entry)
        what = f"{self.kind} '{name}' of {plugin} (entry point {plugin.target})"
        fix = f"update or uninstall {plugin.package}"
        try:
            value: T = entry.load()
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"{what} cannot be loaded ({reason}); {fix}") from error
        if problem := self._check(name, value):
            raise UserError(f"{what}: {problem}; {fix}")
        return value


def _plugin(entry: importlib.metadata.EntryPoint) -> Plugin:
    package = entry.dist
    return Plugin(
        name=entry.name,
        package="unknown package" if package is None else package.name,
        version="" if package is None else package.version,
        target=entry.value,
    )
