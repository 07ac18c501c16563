"""Compilation of the C kernels with the machine's C compiler, once, in about half a second."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from nipq_search.errors import UserError

SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu.c", "relu.c"))
SWITCH = "NIPQ_SEARCH_KERNELS"
"""Environment variable; the value `eager` disables the kernels."""

_COMMON = ("-O3", "-ffp-contract=off", "-fPIC", "-shared")
# OpenMP is tried first; it resolves to the runtime that torch has loaded and shares its threads.
_FLAGS = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)


def _processor() -> str:
    """Return the processor features that the binary depends on.

    Different machines may share a home directory, and hence the cache.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    )


def _folders() -> Iterator[Path]:
    """Yield the writable folders for the library: the user's cache, then a temporary one."""
    user = os.getuid() if hasattr(os, "getuid") else ""
    places = [Path(tempfile.gettempdir()) / f"nipq-search-{user}"]
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        places.insert(0, Path(cache) / "nipq-search")
    except RuntimeError:  # the user has no home directory
        pass
    for place in places:
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(place, os.W_OK) and user in ("", place.stat().st_uid):
                yield place
        except OSError:
            continue


def _compiler() -> str:
    """Return the first C compiler that is installed; the environment variable CC takes precedence.

    Raises:
        OSError: there is none.
    """
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    raise OSError("no C compiler (cc, gcc or clang) was found")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _build(folder: Path) -> Path:
    """Return the path of the library in `folder`; compile it if it is missing or damaged.

    The file name ends with a checksum, because loading a file that was truncated by a full disk
    or a power failure would kill the process.

    Raises:
        OSError: there is no C compiler, it fails, or the folder is not writable.
        subprocess.SubprocessError: the compiler timed out.
    """
    sources = [source.read_text() for source in SOURCES]
    text = "\0".join((*sources, platform.machine(), _processor(), str(_FLAGS)))
    source = _digest(text.encode())
    for found in folder.glob(f"cpu-{source}-*.so"):
        if _digest(found.read_bytes()) == found.stem.rpartition("-")[2]:
            return found
    compiler, message = _compiler(), ""
    with tempfile.TemporaryDirectory(dir=folder) as private:
        made = Path(private) / "cpu.so"
        for flags in _FLAGS:
            command = [compiler, *_COMMON, *flags, *map(str, SOURCES), "-o", str(made), "-lm"]
            result = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=120
            )
            if result.returncode == 0:
                target = folder / f"cpu-{source}-{_digest(made.read_bytes())}.so"
                os.replace(made, target)  # atomic, because other processes may build it too
                return target
            message = message or (result.stderr.strip().splitlines() or ["no message"])[0]
    raise OSError(f"{compiler} failed: {message}")


def switched_off() -> bool:
    """Whether the environment variable disables the kernels.

    Raises:
        UserError: the value of the variable is unknown.
    """
    value = os.environ.get(SWITCH, "")
    if value.lower() not in ("", "eager"):
        raise UserError(f"{SWITCH}: unknown value {value!r}; use eager, or unset it")
    return bool(value)


def _load() -> ctypes.CDLL:
    """Load the library from the first folder where it can be built and loaded.

    Raises:
        OSError: there is no such folder; the error of the last attempt is raised.
        subprocess.SubprocessError: likewise, if the last attempt timed out.
    """
    failure: Exception = OSError("neither the cache nor a temporary folder is writable")
    for folder in _folders():
        try:
            return ctypes.CDLL(str(_build(folder)))
        except (OSError, subprocess.SubprocessError) as error:  # for example, a noexec mount
            failure = error
    raise failure


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the kernels, or None if they are disabled or, with one warning, cannot be loaded.

    Raises:
        UserError: see `switched_off`.
    """
    if switched_off():
        return None
    try:
        loaded = _load()
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"quantizers run without their fast kernels and are several times slower: {error}. "
            f"Install a C compiler (cc, gcc or clang), or set {SWITCH}=eager to silence this "
            "warning",
            stacklevel=2,
        )
        return None
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    float32, integer = ctypes.c_float, ctypes.c_int
    for name, arguments in {
        "nipq_range": [pointer, pointer, float32, float32, integer, int64, pointer],
        "nipq_range_gradients": [pointer, integer, int64, pointer, int64, pointer, pointer],
        "nipq_residuals": [pointer, *[int64] * 4, *[pointer] * 4, integer],
        "nipq_forward": [pointer],
        "nipq_backward": [pointer],
        "nipq_relu_forward": [pointer, pointer, pointer, int64, float32, integer],
        "nipq_relu_backward": [pointer, pointer, pointer, int64, integer],
    }.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    loaded.nipq_residuals.restype = int64
    return loaded
