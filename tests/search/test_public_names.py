"""The names that people import, and the copies of names that must agree."""

from __future__ import annotations

import nipq_search
from nipq_search.cli.arguments import COSTS as COSTS_OF_THE_COMMAND_LINE
from nipq_search.cost import COSTS

PUBLIC = [
    "ActivationConfig",
    "Budget",
    "QuantConfig",
    "Sweep",
    "SweepConfig",
    "UserError",
    "WeightConfig",
    "apply_bit_config",
    "bit_config",
    "cost_penalty",
    "freeze",
    "param_groups",
    "prepare",
    "profile",
    "reestimate_norm_stats",
    "search",
]


def test_public_names_are_frozen():
    assert nipq_search.__all__ == PUBLIC
    assert dir(nipq_search) == PUBLIC


def test_every_public_name_resolves():
    for name in PUBLIC:
        value = getattr(nipq_search, name)
        assert value.__name__ == name and value.__doc__


def test_unknown_names_are_no_attributes():
    assert not hasattr(nipq_search, "export")


def test_the_command_line_knows_every_cost():
    assert set(COSTS_OF_THE_COMMAND_LINE) == set(COSTS)
