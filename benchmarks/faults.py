"""Plant known faults one at a time and record which test finds each of them.

    git clone . ../planted
    python benchmarks/faults.py --faults benchmarks/faults.yaml --tree ../planted --json found.json

Run this script before and after a change to the test suite: every fault that was found before must
still be found. For each fault, the tests listed in `faults.yaml` run first, then the other tests
of the fault's layer and the remaining tests, until one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

LAYERS = ("quant", "cost", "tasks", "train", "tracking", "report", "search", "cli")
"""Layers of the package, lowest first; each has a folder with the same name in `tests`."""

Fault = dict[str, Any]


def load_faults(file: Path, tree: Path) -> list[Fault]:
    """Return the faults of a file; exit if one of them cannot be planted exactly once."""
    faults: list[Fault] = yaml.safe_load(file.read_text())
    names = [fault["id"] for fault in faults]
    wrong = [f"{name}: the id occurs twice" for name in set(names) if names.count(name) > 1]
    for fault in faults:
        if (count := (tree / fault["file"]).read_text().count(fault["old"])) != 1:
            wrong.append(f"{fault['id']}: `old` occurs {count} times in {fault['file']}")
    if wrong:
        sys.exit("\n".join([*wrong, "(`git checkout .` in the tree removes a planted fault)"]))
    return faults


@contextmanager
def planted(fault: Fault, tree: Path) -> Iterator[None]:
    """Plant a fault in the tree for the duration of a `with` block."""
    file = tree / fault["file"]
    before = file.read_text()
    file.write_text(before.replace(fault["old"], fault["new"]))
    try:
        yield
    finally:
        file.write_text(before)


def further(fault: Fault, tree: Path) -> list[str]:
    """Return paths of tests: of the fault's layer, of higher layers, then of everything else."""
    folders = sorted(p.name for p in (tree / "tests").iterdir() if any(p.glob("test_*.py")))
    at = LAYERS.index(fault["layer"])
    order = [*LAYERS[at:], *(f for f in folders if f not in LAYERS), *LAYERS[:at]]
    return [*(f"tests/{name}" for name in order if name in folders), "tests"]


def run_pytest(path: str, done: Sequence[str], tree: Path, minutes: float) -> str | None:
    """Run pytest until a test fails, and return the summary of that test.

    Args:
        path: a file, a folder or a test.
        done: paths to skip because they have already run.
        tree: the clone.
        minutes: time limit; a run that exceeds it counts as a failure.

    Returns:
        The test that failed and the start of its message, or the path and the reason if pytest
        itself failed or took too long; None if all tests passed.
    """
    command = [sys.executable, "-m", "pytest", path, "-x", "-q", "-p", "no:cacheprovider"]
    command += ["--numprocesses", "0", "--tb", "no", "-rfE"]
    command += [f"--{'deselect' if '::' in each else 'ignore'}={each}" for each in done]
    # Python matches cached bytecode to a source file by size and modification time in seconds. A
    # planted fault may change neither, so no bytecode is cached.
    more = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "500"}
    # Processes that a test leaves behind would keep a pipe open, so the output goes to a file.
    with tempfile.TemporaryFile("w+") as output_file:
        process = subprocess.Popen(
            command,
            cwd=tree,
            env={**os.environ, **more},
            stdout=output_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            return f"{path} - still running after {minutes:g} minutes"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output_file.seek(0)
        output = output_file.read()
    for line in output.splitlines():
        kind, _, text = line.partition(" ")
        if kind in ("FAILED", "ERROR"):
            return text
    if status == 4:  # invalid usage
        sys.exit(output)
    return None if status in (0, 5) else f"{path} - exit status {status}"  # 5: no tests remained


def find(fault: Fault, tests: Sequence[str], more: Sequence[str], options: Any) -> dict[str, Any]:
    """Run tests with a planted fault until one fails, and return a record of the result.

    Args:
        fault: the fault.
        tests: paths of the tests that run first.
        more: paths of the tests that run afterwards.
        options: the command line; `tree` and `minutes` are used.

    Returns:
        The ID of the fault, the test that found it (None if all tests passed), the start of that
        test's message, and the wall time in seconds.
    """
    began, found, done = time.monotonic(), None, list[str]()
    with planted(fault, options.tree):
        for path in dict.fromkeys([*tests, *more]):
            if (found := run_pytest(path, done, options.tree, options.minutes)) is not None:
                break
            done.append(path)
    test, _, why = (found or "").partition(" - ")
    seconds = round(time.monotonic() - began, 1)
    return {"id": fault["id"], "found_by": test or None, "why": why, "seconds": seconds}


def main() -> None:
    """Test every fault without a record; print the records and which faults were not found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=Path, required=True, help="YAML list of faults")
    parser.add_argument("--tree", type=Path, required=True, help="clone to plant them in")
    parser.add_argument("--json", type=Path, required=True, help="results; existing ones are kept")
    parser.add_argument("--only", nargs="+", metavar="ID", help="run these faults only")
    parser.add_argument(
        "--tests", type=Path, help="YAML: tests by fault, instead of the listed ones"
    )
    parser.add_argument("--own", action="store_true", help="run the listed tests only")
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="time limit of each pytest run"
    )
    options = parser.parse_args()
    options.tree = options.tree.resolve()
    # Raise an exception on SIGTERM, so that `planted` restores the file.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    mapping = yaml.safe_load(options.tests.read_text()) if options.tests else {}
    faults = load_faults(options.faults, options.tree)
    records = json.loads(options.json.read_text()) if options.json.exists() else []
    for fault in faults:
        name = fault["id"]
        if name in (options.only or [name]) and all(record["id"] != name for record in records):
            tests = mapping.get(name) or fault.get("tests") or []
            more = [] if options.own else further(fault, options.tree)
            records.append(find(fault, tests, more, options))
            options.json.write_text(json.dumps(records, indent=1) + "\n")
            print(records[-1], flush=True)
    missed = [record["id"] for record in records if record["found_by"] is None]
    found = len(records) - len(missed)
    print(f"{found} of {len(records)} found; not found: {', '.join(missed) or '-'}")


if __name__ == "__main__":
    main()
