"""Conformance suites for quantizers, costs, tasks, strategies and samplers, to be subclassed.

A package that adds an entry to a family runs the family's whole suite with one subclass:
`class TestMine(QuantizerConformance): quantizer = MyQuantizer`. Only this package imports pytest
and hypothesis (extra `testing`), and no other package imports it. Start reading in
`quantizers.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest

from nipq_search.registry import Registry

if TYPE_CHECKING:
    from nipq_search.testing.costs import CostConformance
    from nipq_search.testing.quantizers import QuantizerConformance
    from nipq_search.testing.samplers import SamplerConformance
    from nipq_search.testing.strategies import StrategyConformance
    from nipq_search.testing.tasks import TaskConformance

_HOME: Mapping[str, str] = {
    "CostConformance": "nipq_search.testing.costs",
    "QuantizerConformance": "nipq_search.testing.quantizers",
    "SamplerConformance": "nipq_search.testing.samplers",
    "StrategyConformance": "nipq_search.testing.strategies",
    "TaskConformance": "nipq_search.testing.tasks",
}

__all__ = [
    "CostConformance",
    "QuantizerConformance",
    "SamplerConformance",
    "StrategyConformance",
    "TaskConformance",
    "suites",
]

pytest.register_assert_rewrite(*_HOME.values())


def __getattr__(name: str) -> Any:
    """Import a suite on first use, since each family needs its own libraries."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def suites(suite: type, registry: Registry[Any]) -> dict[str, type]:
    """Return a subclass of a suite for each entry of a registry, by class name.

    For pytest to collect them, a test module adds them to its namespace with
    `globals().update(suites(TaskConformance, TASKS))`.

    Args:
        suite: a conformance suite, such as `TaskConformance`.
        registry: the family's registry; plug-ins that have not been looked up are not included.

    Returns:
        Test classes named `Test_<name>`. Each has the attributes `<registry.kind>`, the entry, and
        `name`, the entry's name.
    """
    return {
        f"Test_{name}": type(f"Test_{name}", (suite,), {registry.kind: value, "name": name})
        for name, value in registry.items()
    }
