"""Run the conformance suite on every strategy in `STRATEGIES`, including ones added later."""

from __future__ import annotations

from nipq_search.search.strategies.strategies import STRATEGIES
from nipq_search.testing import StrategyConformance, suites

globals().update(suites(StrategyConformance, STRATEGIES))
