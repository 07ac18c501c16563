"""Build the C kernels once per machine, in half a second, with the C compiler that is there."""

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
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu.c")
SWITCH = "NIPQ_SEARCH_KERNELS"
"""Environment variable; `eager` switches the kernels off."""

_COMMON = ("-O3", "-ffp-contract=off", "-fPIC", "-shared")
# OpenMP first: the library is then torch's own, which is loaded already, and shares its threads.
_FLAGS = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)


def _processor() -> str:
    """What the machine code depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    )


def _folder() -> Path:
    """The user's cache; a folder of this user's among temporary files where it is read-only."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nipq-search"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="nipq-search-"))


def _compiler() -> str:
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    raise OSError("no C compiler (cc, gcc or clang) was found")


def _build() -> Path:
    """The library's path; it is compiled where this machine has none of this source yet."""
    text = "\0".join((SOURCE.read_text(), platform.machine(), _processor(), str(_FLAGS)))
    target = _folder() / f"cpu-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    compiler, said = _compiler(), ""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        for flags in _FLAGS:
            command = [compiler, *_COMMON, *flags, str(SOURCE), "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if result.returncode == 0:
                os.replace(made, target)  # whole or not at all: another process may build too
                return target
            said = said or (result.stderr.strip().splitlines() or ["no message"])[0]
    raise OSError(f"{compiler} failed: {said}")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where they are switched off or cannot be built, with one warning."""
    if os.environ.get(SWITCH, "").lower() == "eager":
        return None
    try:
        loaded = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"quantizers run without their fast kernels, three times slower: {error}. Install a "
            f"C compiler, or set {SWITCH}=eager to silence this",
            stacklevel=2,
        )
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, arguments in {
        "nipq_forward": [pointer],
        "nipq_backward": [pointer],
        "nipq_relu_forward": [pointer, pointer, pointer, number, ctypes.c_float, ctypes.c_int],
        "nipq_relu_backward": [pointer, pointer, pointer, number, ctypes.c_int],
    }.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded
