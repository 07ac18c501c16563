"""Provenance of a result: the software versions and CPU capability that it was computed with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nipq_search.search.config.plugins import plugin_versions
from nipq_search.search.config.sweep_config import SweepConfig
from nipq_search.version import __version__


def provenance(config: SweepConfig) -> dict[str, Any]:
    """Return the software versions and the CPU capability with which this process computes.

    Repeating a training run on CPUs with the same provenance and the same number of threads gives
    bit-identical results.

    Args:
        config: the sweep configuration; the versions of the plug-ins that it uses are included.
    """
    return {
        "nipq_search": __version__,
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "plugins": plugin_versions(config.entries),
    }


def provenance_changes(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """List the differences between two provenances, such as `torch 2.13.0, here 2.14.1`."""
    old, current = _flat(recorded), _flat(here)
    return [
        f"{key} {old.get(key, 'unknown')}, here {current.get(key, 'none')}"
        for key in [*old, *(key for key in current if key not in old)]
        if old.get(key) != current.get(key)
    ]


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat copy of a provenance, in which each plug-in has a key of its own."""
    return {**{k: v for k, v in nested.items() if k != "plugins"}, **nested.get("plugins", {})}
