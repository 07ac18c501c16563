"""The conformance suite for every quantizer in `QUANTIZERS`; a new one needs no code here."""

from __future__ import annotations

from nipq_search.quant import QUANTIZERS
from nipq_search.testing import QuantizerConformance, suites

globals().update(suites(QuantizerConformance, QUANTIZERS))
