"""Records test durations and marks slow tests.

This is a pytest plugin, loaded by `tests/conftest.py`. `make durations` runs every test and writes
`tests/durations.json`. At collection, tests recorded as slower than `SLOW_SECONDS` are marked
`slow`; `make test-fast` skips them.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).with_name("durations.json")
SLOW_SECONDS = 2.0
"""A test is slow if it takes longer than this, including the fixtures that it shares."""
LEAST_SECONDS = 0.3
"""Tests that take less than this are not recorded."""


def recorded(file: Path = FILE) -> dict[str, dict[str, float]]:
    """Return the recorded seconds of `tests`, by name without parameters, and of `files`."""
    return json.loads(file.read_text()) if file.exists() else {"tests": {}, "files": {}}


def without_parameters(nodeid: str) -> str:
    """Return `tests/a.py::test_b` for `tests/a.py::test_b[c]`."""
    return nodeid.partition("[")[0]


class Durations:
    """Measure tests in the process that runs them, and collect the figures in the controller.

    The setup of a module- or session-scoped fixture runs within the first test that requests it.
    Its time is counted for every test that requests it, since any of them may come first.
    """

    def __init__(self, file: Path | None) -> None:
        """Write the figures to `file` at the end of the run, unless it is None."""
        self.file = file
        self.shared: dict[str, float] = {}
        self.own: dict[str, float] = defaultdict(float)
        self.within = 0.0
        self.tests: dict[str, float] = {}
        self.files: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        """Measure fixtures that several tests share."""
        began, inner = time.monotonic(), self.within
        try:
            return (yield)
        finally:
            spent = time.monotonic() - began
            if fixturedef.scope != "function":
                # Fixtures that this one requested are counted separately.
                self.shared[fixturedef.argname] = spent - (self.within - inner)
                self.within = inner + spent

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Iterator[None]:
        """Attach the duration of a test to its last report."""
        report: Any = yield
        if call.when == "setup":
            self.own[item.nodeid] = -self.within
            self.within = 0.0
        self.own[item.nodeid] += call.duration
        if call.when == "teardown":
            names = getattr(item, "fixturenames", ())
            shared = sum(self.shared.get(name, 0.0) for name in names)
            report.user_properties.append(("seconds", self.own.pop(item.nodeid) + shared))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Update the longest duration among a test's parameters and the total of its file."""
        self.files[report.nodeid.partition("::")[0]] += report.duration
        for name, value in report.user_properties:
            if name == "seconds" and report.when == "teardown":
                test = without_parameters(report.nodeid)
                self.tests[test] = max(self.tests.get(test, 0.0), float(value))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the record in xdist's controller, or in the only process without xdist."""
        if self.file is not None and not hasattr(session.config, "workerinput"):
            record = {
                kind: {k: round(v, 1) for k, v in sorted(found.items()) if v >= LEAST_SECONDS}
                for kind, found in (("files", self.files), ("tests", self.tests))
            }
            self.file.write_text(json.dumps(record, indent=1) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--write-durations`."""
    parser.addoption(
        "--write-durations", action="store_true", help=f"write {FILE.name} next to the tests"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Measure durations only in runs that write the record."""
    if config.getoption("--write-durations"):
        config.pluginmanager.register(Durations(FILE), "nipq-durations")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests."""
    seconds = recorded()["tests"]
    for item in items:
        if seconds.get(without_parameters(item.nodeid), 0.0) > SLOW_SECONDS:
            item.add_marker(pytest.mark.slow)
