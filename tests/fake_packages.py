"""Installed packages that exist as metadata and modules only, for tests of entry points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(
    site: Path,
    package: str,
    version: str = "1.0",
    *,
    points: Mapping[str, Mapping[str, str]],
    modules: Mapping[str, str] | None = None,
) -> None:
    """Write the files that an installer would write for a package.

    Args:
        site: folder on the import path.
        package: name of the distribution.
        version: its version.
        points: entry points as `module:attribute`, by group and name.
        modules: source code by module name.
    """
    info = site / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata)
    lines = []
    for group, entries in points.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for name, source in (modules or {}).items():
        (site / f"{name}.py").write_text(source)
