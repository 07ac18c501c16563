"""Bit operations (BOPs), counted according to convention 1; see `CONVENTION`."""

from __future__ import annotations

from typing import Any

from nipq_search.cost.base import Bits, Cost, sum_terms
from nipq_search.quant.graph import FLOAT_BITS, Graph

CONVENTION = 1
"""Version of the counting rules, reported as `bops_convention` in JSON documents.

Per sample, a layer costs `MACs * weight bits * input bits`, and a product of two activations
`MACs * bits * bits`. Raw uint8 input counts as 8 bits, and a floating-point operand as 32 bits.
Biases, normalization and element-wise operations are not counted. 1 GBOPs is 1e9.
"""


def bops_terms(graph: Graph, bits: Bits) -> dict[str, Any]:
    """Return the bit operations of each layer, per sample."""

    def width(tensor: str | None) -> Any:
        return FLOAT_BITS if tensor is None else bits[tensor]

    return {
        layer.name: layer.macs * width(layer.weight or layer.second) * width(layer.input)
        for layer in graph.layers
    }


BOPS = Cost(name="bops", terms=bops_terms, combine=sum_terms)
