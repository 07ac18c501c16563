"""Run the conformance suite on every quantizer in `QUANTIZERS`, including ones added later."""

from __future__ import annotations

from nipq_search.quant import QUANTIZERS
from nipq_search.testing import QuantizerConformance, suites

globals().update(suites(QuantizerConformance, QUANTIZERS))
