"""The conformance suite for every strategy in `STRATEGIES`; a new one needs no code here."""

from __future__ import annotations

from nipq_search.search.strategies.strategies import STRATEGIES
from nipq_search.testing import StrategyConformance, suites

globals().update(suites(StrategyConformance, STRATEGIES))
