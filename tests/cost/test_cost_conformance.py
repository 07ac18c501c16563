"""The conformance suite for every cost in `COSTS`; a new one needs no code here."""

from __future__ import annotations

from nipq_search.cost import COSTS
from nipq_search.testing import CostConformance, suites

globals().update(suites(CostConformance, COSTS))
