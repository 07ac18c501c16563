"""Run the conformance suite on every cost in `COSTS`, including ones added later."""

from __future__ import annotations

from nipq_search.cost import COSTS
from nipq_search.testing import CostConformance, suites

globals().update(suites(CostConformance, COSTS))
