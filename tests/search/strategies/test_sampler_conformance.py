"""The conformance suite for every sampler in `SAMPLERS`; a new one needs no code here."""

from __future__ import annotations

from nipq_search.search.strategies.samplers import SAMPLERS
from nipq_search.testing import SamplerConformance, suites

globals().update(suites(SamplerConformance, SAMPLERS))
