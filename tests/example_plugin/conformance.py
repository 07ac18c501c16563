"""The conformance suites for every entry of the package: run `pytest conformance.py`."""

from __future__ import annotations

from nipq_example.cost import TRAFFIC_BYTES
from nipq_example.quantizer import Clip
from nipq_example.sampler import PARZEN
from nipq_example.strategy import RoundRobin
from nipq_example.task import Rings

from nipq_search.testing import (
    CostConformance,
    QuantizerConformance,
    SamplerConformance,
    StrategyConformance,
    TaskConformance,
)


class TestClip(QuantizerConformance):
    quantizer = Clip


class TestTraffic(CostConformance):
    cost = TRAFFIC_BYTES


class TestRings(TaskConformance):
    task = Rings


class TestRoundRobin(StrategyConformance):
    strategy = RoundRobin


class TestParzen(SamplerConformance):
    sampler = PARZEN
