"""Run the conformance suite on every sampler in `SAMPLERS`, including ones added later."""

from __future__ import annotations

from nipq_search.search.strategies.samplers import SAMPLERS
from nipq_search.testing import SamplerConformance, suites

globals().update(suites(SamplerConformance, SAMPLERS))
